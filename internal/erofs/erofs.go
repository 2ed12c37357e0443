// Package erofs writes and reads file system images in the plain form of EROFS that gVisor can boot from: no compression, no chunks, no
// extended attributes, and no inline data of regular files, which gVisor cannot map. It knows nothing of templates or sandboxes.
//
// An image is written front to back: a block for the super block, then the contents of files in any order, and the tree at the end. So
// contents can be streamed into it while the tree still changes. See https://docs.kernel.org/filesystems/erofs.html and Linux's erofs_fs.h.
package erofs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// BlockSize is the unit of everything in an image, in bytes. gVisor accepts no other.
const BlockSize = 4096

// Limits of the format.
const (
	maxName   = 255
	maxTarget = 4095 // of a symbolic link
	MaxBlocks = math.MaxUint32
)

// ErrFormat means that a file is not an image of this form.
var ErrFormat = errors.New("not a plain EROFS image")

// Node is a file of an image. A node that is in several directories has several names: they are hard links.
type Node struct {
	Mode     uint16 // as in stat(2), including the type
	UID, GID uint32
	Time     time.Time // of the last change of the content; times before 1970 become 1970
	Target   string    // of a symbolic link
	Device   uint64    // of a device, as from makedev(3)
	Data     Extent    // of a regular file
	Children map[string]*Node

	nid, size uint64
	links     uint32
	block     uint32 // of a directory's entries; 0 if they are inline
	ino       uint32
}

// Extent is where the content of a file is in an image.
type Extent struct {
	Block uint32
	Size  int64 // bytes
}

// Type returns the part of the mode that says what kind of file the node is.
func (n *Node) Type() uint16 { return n.Mode & unix.S_IFMT }

// IsDir reports whether the node is a directory.
func (n *Node) IsDir() bool { return n.Type() == unix.S_IFDIR }

// Names returns the names in a directory, sorted.
func (n *Node) Names() []string {
	names := make([]string, 0, len(n.Children))
	for name := range n.Children {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Writer writes an image. It is not safe for concurrent use.
type Writer struct {
	f    *os.File
	next uint32 // block
	buf  []byte
}

// NewWriter starts an image in an empty file.
func NewWriter(f *os.File) *Writer { return &Writer{f: f, next: 1, buf: make([]byte, 256<<10)} }

// Size returns how many bytes the image has so far.
func (w *Writer) Size() int64 { return int64(w.next) * BlockSize }

// Add writes the content of a file and returns where it is. A part that is all zeros takes no room on disk. Errors of r are returned
// unchanged.
func (w *Writer) Add(r io.Reader) (Extent, error) {
	e := Extent{Block: w.next}
	for {
		n, err := io.ReadFull(r, w.buf)
		if n > 0 {
			if int64(w.next)+int64(n+BlockSize-1)/BlockSize > MaxBlocks {
				return Extent{}, fmt.Errorf("image: more than %d blocks", int64(MaxBlocks))
			}
			if !isZero(w.buf[:n]) {
				if _, err := w.f.WriteAt(w.buf[:n], w.Size()); err != nil {
					return Extent{}, err
				}
			}
			e.Size += int64(n)
			w.next += uint32((n + BlockSize - 1) / BlockSize)
		}
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			if e.Size == 0 {
				e.Block = 0
			}
			return e, nil
		default:
			return Extent{}, err
		}
	}
}

func isZero(b []byte) bool {
	for len(b) >= 8 {
		if b[0]|b[1]|b[2]|b[3]|b[4]|b[5]|b[6]|b[7] != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// trim frees the disk space of contents that no file in the tree has any more, because they were replaced or removed.
func (w *Writer) trim(all []placed) error {
	var used []Extent
	for _, p := range all {
		if p.node.Data.Size > 0 {
			used = append(used, p.node.Data)
		}
	}
	slices.SortFunc(used, func(a, b Extent) int { return cmp.Compare(a.Block, b.Block) })
	at := uint32(1)
	for _, e := range append(used, Extent{Block: w.next}) {
		if e.Block > at {
			err := unix.Fallocate(int(w.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(at)*BlockSize,
				int64(e.Block-at)*BlockSize)
			if err == unix.EOPNOTSUPP {
				return nil // then the image only takes more room
			}
			if err != nil {
				return fmt.Errorf("image: punch hole: %w", err)
			}
		}
		at = max(at, e.Block+uint32((e.Size+BlockSize-1)/BlockSize))
	}
	return nil
}

// Base makes the image begin with all contents of another image, so that the extents of that image's tree are valid in this one. It must be
// called before any Add, and ends early when ctx ends.
func (w *Writer) Base(ctx context.Context, from *Image) error {
	if w.next != 1 {
		return errors.New("image: Base after Add")
	}
	end := int64(from.metaBlock) * BlockSize
	for at := int64(BlockSize); at < end; { // holes stay holes
		data, err := unix.Seek(int(from.f.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO || err == nil && data >= end {
			break
		}
		if err != nil {
			return fmt.Errorf("image: seek: %w", err)
		}
		hole, err := unix.Seek(int(from.f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("image: seek: %w", err)
		}
		if err := copyRange(ctx, w.f, from.f, data, min(hole, end)); err != nil {
			return fmt.Errorf("image: copy: %w", err)
		}
		at = hole
	}
	w.next = from.metaBlock
	return nil
}

// copyPart is after how many bytes a copy checks whether ctx has ended.
const copyPart = 32 << 20

// copyRange copies [at, end) in the kernel, which may share the blocks between the files.
func copyRange(ctx context.Context, to, from *os.File, at, end int64) error {
	for at < end {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		in, out := at, at
		part := min(end-at, copyPart)
		n, err := unix.CopyFileRange(int(from.Fd()), &in, int(to.Fd()), &out, int(part), 0)
		if err == unix.EXDEV || err == unix.ENOSYS || err == unix.EOPNOTSUPP || err == unix.EINVAL {
			var copied int64
			copied, err = io.Copy(io.NewOffsetWriter(to, at), io.NewSectionReader(from, at, part))
			n = int(copied)
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		at += int64(n)
	}
	return nil
}
