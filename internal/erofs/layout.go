package erofs

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Constants from erofs_fs.h.
const (
	magic       = 0xe0f5e1e2
	superAt     = 1024
	superSize   = 128
	hasChecksum = 1
	inodeSize   = 64 // the extended form, which has times and 32-bit IDs
	direntSize  = 12
	slotSize    = 32

	extended    = 1
	layoutPlain = 0 << 1
	layoutInner = 2 << 1 // the content follows the inode
)

// maxInline is how much content may follow an inode: both must be in one block.
const maxInline = BlockSize - inodeSize

// fileTypes are the types in directory entries.
var fileTypes = map[uint16]byte{unix.S_IFREG: 1, unix.S_IFDIR: 2, unix.S_IFCHR: 3, unix.S_IFBLK: 4, unix.S_IFIFO: 5, unix.S_IFSOCK: 6,
	unix.S_IFLNK: 7}

// placed is a node with the first directory that has it. A list of them is in the order of the image.
type placed struct{ node, parent *Node }

// Finish writes the tree below root, which completes the image. Extents in the tree must be unchanged since Add returned them, and no
// directory may contain itself.
func (w *Writer) Finish(root *Node) error {
	all, err := collect(root)
	if err != nil {
		return err
	}
	if err := w.trim(all); err != nil {
		return err
	}
	for _, p := range all { // large directories have their own blocks, before the inodes
		n := p.node
		n.block = 0
		if n.IsDir() {
			n.size = dirSize(n)
			if n.size > maxInline {
				n.block = w.next
				w.next += uint32((n.size + BlockSize - 1) / BlockSize)
			}
		}
	}
	meta := w.next
	at := uint64(slotSize * 2) // the root is near the beginning, because its number has 16 bits
	for i, p := range all {
		n := p.node
		need := inodeSize + n.inline()
		if room := BlockSize - at%BlockSize; need > room {
			at += room
		}
		n.nid, n.ino = at/slotSize, uint32(i+1)
		at += (need + slotSize*2 - 1) / (slotSize * 2) * (slotSize * 2)
	}
	metaBlocks := at/BlockSize + 1 // erofs-utils looks for attributes behind the last inode
	if uint64(meta)+metaBlocks > MaxBlocks {
		return fmt.Errorf("image: more than %d blocks", int64(MaxBlocks))
	}
	for _, p := range all {
		if p.node.block != 0 {
			if _, err := w.f.WriteAt(encodeDir(p), int64(p.node.block)*BlockSize); err != nil {
				return err
			}
		}
	}
	if err := w.writeInodes(all, int64(meta)*BlockSize); err != nil {
		return err
	}
	w.next = meta + uint32(metaBlocks)
	if err := w.f.Truncate(w.Size()); err != nil {
		return err
	}
	_, err = w.f.WriteAt(w.superBlock(meta, uint64(len(all)), root.nid), 0)
	return err
}

// inline returns how many bytes of content follow the inode.
func (n *Node) inline() uint64 {
	switch {
	case n.Type() == unix.S_IFLNK, n.IsDir() && n.block == 0:
		return n.size
	}
	return 0
}

// collect lists the nodes of a tree, checks them and counts their links.
func collect(root *Node) ([]placed, error) {
	if !root.IsDir() {
		return nil, fmt.Errorf("image: the root is not a directory")
	}
	var all []placed
	seen := map[*Node]bool{}
	var walk func(n, parent *Node) error
	walk = func(n, parent *Node) error {
		if seen[n] {
			if n.IsDir() {
				return fmt.Errorf("image: a directory has two places")
			}
			n.links++
			return nil
		}
		seen[n] = true
		if fileTypes[n.Type()] == 0 {
			return fmt.Errorf("image: a node has no type (mode %o)", n.Mode)
		}
		n.links, n.size = 1, uint64(n.Data.Size)
		all = append(all, placed{n, parent})
		switch n.Type() {
		case unix.S_IFLNK:
			if n.size = uint64(len(n.Target)); n.size == 0 || n.size > min(maxTarget, maxInline) {
				return fmt.Errorf("image: the target of a link has %d bytes", n.size)
			}
		case unix.S_IFDIR:
			n.links = 2
			for _, name := range n.Names() {
				if name == "" || name == "." || name == ".." || len(name) > maxName || strings.ContainsAny(name, "/\x00") {
					return fmt.Errorf("image: %q is not a valid file name", name)
				}
				child := n.Children[name]
				if err := walk(child, n); err != nil {
					return err
				}
				if child.IsDir() {
					n.links++
				}
			}
		}
		return nil
	}
	return all, walk(root, root)
}

// entries returns the names of a directory in the order of the format, block by block; each block holds as many as fit.
func entries(n *Node) [][]string {
	names := append(n.Names(), ".", "..")
	slices.Sort(names)
	var blocks [][]string
	room := 0
	for _, name := range names {
		need := direntSize + len(name)
		if need > room {
			blocks, room = append(blocks, nil), BlockSize
		}
		last := len(blocks) - 1
		blocks[last] = append(blocks[last], name)
		room -= need
	}
	return blocks
}

func dirSize(n *Node) uint64 {
	blocks := entries(n)
	size := uint64(len(blocks)-1) * BlockSize
	for _, name := range blocks[len(blocks)-1] {
		size += uint64(direntSize + len(name))
	}
	return size
}

// encodeDir returns the content of a directory.
func encodeDir(p placed) []byte {
	out := make([]byte, 0, p.node.size)
	for _, names := range entries(p.node) {
		if pad := len(out) % BlockSize; pad != 0 {
			out = append(out, make([]byte, BlockSize-pad)...)
		}
		at := len(names) * direntSize
		for _, name := range names {
			child := p.node.Children[name]
			switch name {
			case ".":
				child = p.node
			case "..":
				child = p.parent
			}
			out = binary.LittleEndian.AppendUint64(out, child.nid)
			out = binary.LittleEndian.AppendUint16(out, uint16(at))
			out = append(out, fileTypes[child.Type()], 0)
			at += len(name)
		}
		for _, name := range names {
			out = append(out, name...)
		}
	}
	return out
}

func (w *Writer) writeInodes(all []placed, meta int64) error {
	out := bufio.NewWriterSize(io.NewOffsetWriter(w.f, meta), 1<<20)
	at := uint64(0)
	var zeros [BlockSize]byte
	for _, p := range all {
		if _, err := out.Write(zeros[:p.node.nid*slotSize-at]); err != nil {
			return err
		}
		body := p.node.encode()
		switch {
		case p.node.Type() == unix.S_IFLNK:
			body = append(body, p.node.Target...)
		case p.node.inline() > 0:
			body = append(body, encodeDir(p)...)
		}
		if _, err := out.Write(body); err != nil {
			return err
		}
		at = p.node.nid*slotSize + uint64(len(body))
	}
	return out.Flush()
}

// encode returns the inode in the extended form.
func (n *Node) encode() []byte {
	format, where := uint16(extended|layoutPlain), n.Data.Block
	switch {
	case n.inline() > 0:
		format = extended | layoutInner
	case n.IsDir():
		where = n.block
	case n.Type() == unix.S_IFCHR || n.Type() == unix.S_IFBLK:
		major, minor := unix.Major(n.Device), unix.Minor(n.Device) // as in Linux's new_encode_dev
		where = minor&0xff | major<<8 | minor&^0xff<<12
	}
	seconds, nanos := n.Time.Unix(), n.Time.Nanosecond()
	if seconds < 0 {
		seconds, nanos = 0, 0
	}
	b := make([]byte, 0, BlockSize)
	b = binary.LittleEndian.AppendUint16(b, format)
	b = binary.LittleEndian.AppendUint16(b, 0) // extended attributes
	b = binary.LittleEndian.AppendUint16(b, n.Mode)
	b = binary.LittleEndian.AppendUint16(b, 0)
	b = binary.LittleEndian.AppendUint64(b, n.size)
	b = binary.LittleEndian.AppendUint32(b, where)
	b = binary.LittleEndian.AppendUint32(b, n.ino)
	b = binary.LittleEndian.AppendUint32(b, n.UID)
	b = binary.LittleEndian.AppendUint32(b, n.GID)
	b = binary.LittleEndian.AppendUint64(b, uint64(seconds))
	b = binary.LittleEndian.AppendUint32(b, uint32(nanos))
	b = binary.LittleEndian.AppendUint32(b, n.links)
	return append(b, make([]byte, inodeSize-len(b))...)
}

// superBlock returns block 0.
func (w *Writer) superBlock(meta uint32, inodes, root uint64) []byte {
	block := make([]byte, BlockSize)
	s := block[superAt:]
	binary.LittleEndian.PutUint32(s, magic)
	binary.LittleEndian.PutUint32(s[8:], hasChecksum)
	s[12] = 12 // log2 of the block size
	binary.LittleEndian.PutUint16(s[14:], uint16(root))
	binary.LittleEndian.PutUint64(s[16:], inodes)
	binary.LittleEndian.PutUint32(s[36:], w.next)
	binary.LittleEndian.PutUint32(s[40:], meta)
	binary.LittleEndian.PutUint32(s[4:], checksum(block))
	return block
}

// checksum returns the checksum of a super block whose checksum field is zero.
func checksum(block []byte) uint32 {
	return ^crc32.Checksum(block[superAt:], crc32.MakeTable(crc32.Castagnoli))
}
