package erofs

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Image is an image in the form that Writer writes. It is safe for concurrent use.
type Image struct {
	f         *os.File
	size      int64
	metaBlock uint32
	root      uint64
	inodes    uint64
}

// Open opens an image.
func Open(name string) (*Image, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	m := &Image{f: f}
	if err := m.readSuper(); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("open image: %w", err)
	}
	return m, nil
}

// Close closes the image; readers from Content fail afterwards.
func (m *Image) Close() error { return m.f.Close() }

// Content returns a reader of the content of a file.
func (m *Image) Content(e Extent) *io.SectionReader {
	return io.NewSectionReader(m.f, int64(e.Block)*BlockSize, e.Size)
}

func (m *Image) readSuper() error {
	info, err := m.f.Stat()
	if err != nil {
		return err
	}
	m.size = info.Size()
	block := make([]byte, BlockSize)
	if _, err := m.f.ReadAt(block, 0); err != nil {
		return fmt.Errorf("%w: %w", ErrFormat, err)
	}
	s := block[superAt:]
	sum := binary.LittleEndian.Uint32(s[4:])
	clear(s[4:8])
	if binary.LittleEndian.Uint32(s) != magic || s[12] != 12 || binary.LittleEndian.Uint32(s[80:]) != 0 || sum != checksum(block) {
		return ErrFormat
	}
	m.root, m.inodes = uint64(binary.LittleEndian.Uint16(s[14:])), binary.LittleEndian.Uint64(s[16:])
	m.metaBlock = binary.LittleEndian.Uint32(s[40:])
	if int64(binary.LittleEndian.Uint32(s[36:]))*BlockSize != m.size || int64(m.metaBlock)*BlockSize >= m.size {
		return fmt.Errorf("%w: it is cut short", ErrFormat)
	}
	return nil
}

// Tree reads the whole tree.
func (m *Image) Tree() (*Node, error) {
	meta := make([]byte, m.size-int64(m.metaBlock)*BlockSize)
	if _, err := m.f.ReadAt(meta, int64(m.metaBlock)*BlockSize); err != nil {
		return nil, fmt.Errorf("read image: %w", err)
	}
	r := &treeReader{image: m, meta: meta, nodes: map[uint64]*Node{}}
	root, err := r.node(m.root)
	if err == nil && !root.IsDir() {
		err = ErrFormat
	}
	if err != nil {
		return nil, fmt.Errorf("read image: %w", err)
	}
	return root, nil
}

type treeReader struct {
	image *Image
	meta  []byte
	nodes map[uint64]*Node
}

func (r *treeReader) node(nid uint64) (*Node, error) {
	if n := r.nodes[nid]; n != nil {
		if n.IsDir() {
			return nil, fmt.Errorf("%w: a directory has two places", ErrFormat)
		}
		return n, nil
	}
	at := nid * slotSize
	if nid > uint64(len(r.meta))/slotSize || at+inodeSize > uint64(len(r.meta)) {
		return nil, fmt.Errorf("%w: inode %d is not in it", ErrFormat, nid)
	}
	b := r.meta[at:]
	format := binary.LittleEndian.Uint16(b)
	if format != extended|layoutPlain && format != extended|layoutInner || binary.LittleEndian.Uint16(b[2:]) != 0 {
		return nil, fmt.Errorf("%w: inode %d", ErrFormat, nid)
	}
	where := binary.LittleEndian.Uint32(b[16:])
	n := &Node{
		Mode: binary.LittleEndian.Uint16(b[4:]), UID: binary.LittleEndian.Uint32(b[24:]), GID: binary.LittleEndian.Uint32(b[28:]),
		Time: time.Unix(int64(binary.LittleEndian.Uint64(b[32:])), int64(binary.LittleEndian.Uint32(b[40:]))),
		size: binary.LittleEndian.Uint64(b[8:]),
	}
	r.nodes[nid] = n
	var inner []byte
	if format&layoutInner != 0 {
		if n.size > maxInline || inodeSize+n.size > uint64(len(b)) {
			return nil, fmt.Errorf("%w: inode %d", ErrFormat, nid)
		}
		inner = b[inodeSize : inodeSize+n.size]
	}
	switch n.Type() {
	case unix.S_IFREG:
		if end := int64(where)*BlockSize + int64(n.size); inner != nil || n.size > uint64(r.image.size) || end > r.image.size {
			return nil, fmt.Errorf("%w: inode %d", ErrFormat, nid)
		}
		n.Data = Extent{Block: where, Size: int64(n.size)}
	case unix.S_IFLNK:
		n.Target = string(inner)
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Device = unix.Mkdev(where&0xfff00>>8, where&0xff|where>>12&0xfff00)
	case unix.S_IFDIR:
		return n, r.children(n, where, inner)
	case unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return nil, fmt.Errorf("%w: inode %d", ErrFormat, nid)
	}
	return n, nil
}

// children reads the entries of a directory.
func (r *treeReader) children(n *Node, block uint32, inner []byte) error {
	n.Children = map[string]*Node{}
	body := inner
	if body == nil {
		if n.size > uint64(r.image.size) {
			return ErrFormat
		}
		body = make([]byte, n.size)
		if _, err := r.image.f.ReadAt(body, int64(block)*BlockSize); err != nil {
			return err
		}
	}
	for len(body) > 0 {
		part := body[:min(len(body), BlockSize)]
		body = body[len(part):]
		if len(part) < direntSize {
			return ErrFormat
		}
		count := int(binary.LittleEndian.Uint16(part[8:])) / direntSize
		for i := range count {
			if (i+1)*direntSize > len(part) {
				return ErrFormat
			}
			entry := part[i*direntSize:]
			from, to := int(binary.LittleEndian.Uint16(entry[8:])), len(part)
			if i+1 < count {
				to = int(binary.LittleEndian.Uint16(part[(i+1)*direntSize+8:]))
			}
			if from > to || to > len(part) {
				return ErrFormat
			}
			name := part[from:to]
			if i+1 == count { // the last name may be padded
				for len(name) > 0 && name[len(name)-1] == 0 {
					name = name[:len(name)-1]
				}
			}
			if string(name) == "." || string(name) == ".." {
				continue
			}
			child, err := r.node(binary.LittleEndian.Uint64(entry))
			if err != nil {
				return err
			}
			n.Children[string(name)] = child
		}
	}
	return nil
}

// Used returns how many bytes the image takes on disk.
func (m *Image) Used() (int64, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(m.f.Fd()), &st)
	return st.Blocks * 512, err
}
