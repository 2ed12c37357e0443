package template

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"math"

	"github.com/ulikunitz/xz/lzma"
)

// xzReader passes an .xz file on unchanged (https://tukaani.org/xz/xz-file-format.txt). Before each block it asks whether the block's
// window may be allocated, because the decoder allocates whatever a block names, up to 4 GB.
type xzReader struct {
	from   *bufio.Reader
	window func(bytes int64) error

	pending []byte // parsed, still to be returned
	raw     int64  // bytes after pending that are returned without parsing
	next    func() error
	check   int64 // bytes of the checksum of a block
	block   int64 // bytes of the block so far, for its padding
}

var errXZ = errors.New("it is not a valid xz file")

// Read implements io.Reader.
func (x *xzReader) Read(p []byte) (int, error) {
	if x.next == nil {
		x.next = x.streamHeader
	}
	for len(x.pending) == 0 && x.raw == 0 {
		if err := x.next(); err != nil {
			return 0, err
		}
	}
	if len(x.pending) > 0 {
		n := copy(p, x.pending)
		x.pending = x.pending[n:]
		return n, nil
	}
	n, err := x.from.Read(p[:min(int64(len(p)), x.raw)])
	x.raw -= int64(n)
	return n, cutShort(err)
}

// cutShort turns io.EOF into the error of a file that ends too early.
func cutShort(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// look reads n bytes, which Read returns later.
func (x *xzReader) look(n int) ([]byte, error) {
	at := len(x.pending)
	x.pending = append(x.pending, make([]byte, n)...)
	_, err := io.ReadFull(x.from, x.pending[at:])
	return x.pending[at:], cutShort(err)
}

// streamHeader reads the header of a stream. More streams may follow, with zeros between them.
func (x *xzReader) streamHeader() error {
	head, err := x.from.Peek(4)
	if err == io.EOF && len(head) == 0 {
		return io.EOF
	}
	if len(head) == 4 && binary.LittleEndian.Uint32(head) == 0 {
		_, err := x.look(4)
		return err
	}
	if head, err = x.look(12); err != nil {
		return err
	}
	kind := head[7] & 0x0f
	x.check = 0
	if kind > 0 {
		x.check = 4 << ((kind - 1) / 3)
	}
	x.next = x.blockHeader
	return nil
}

// blockHeader reads the header of a block, or the index.
func (x *xzReader) blockHeader() error {
	size, err := x.look(1)
	if err != nil {
		return err
	}
	if size[0] == 0 {
		x.next = nil
		return x.index()
	}
	head, err := x.look(int(size[0])*4 + 3)
	if err != nil {
		return err
	}
	fields := head[1:]
	for _, has := range []byte{0x40, 0x80} { // optional sizes
		if head[0]&has == 0 {
			continue
		}
		_, n := binary.Uvarint(fields)
		if n <= 0 {
			return errXZ
		}
		fields = fields[n:]
	}
	if head[0]&0x3f != 0 || len(fields) < 3 || fields[0] != 0x21 || fields[1] != 1 {
		return errors.New("it is compressed by xz with filters other than LZMA2; compress it without them")
	}
	window, err := lzma.DecodeDictCap(fields[2])
	if err != nil {
		return errXZ
	}
	x.next, x.block = x.chunk, 0
	return x.window(window)
}

// chunk reads the header of a chunk of a block.
func (x *xzReader) chunk() error {
	control, err := x.look(1)
	if err != nil {
		return err
	}
	x.block++
	switch c := control[0]; {
	case c == 0: // the end of the block, padded to a multiple of four
		x.raw, x.next = (4-x.block%4)%4+x.check, x.blockHeader
		return nil
	case c <= 2: // stored
		size, err := x.look(2)
		if err != nil {
			return err
		}
		x.block, x.raw = x.block+2, int64(binary.BigEndian.Uint16(size))+1
	case c < 0x80:
		return errXZ
	default:
		size, err := x.look(4)
		if err != nil {
			return err
		}
		x.block, x.raw = x.block+4, int64(binary.BigEndian.Uint16(size[2:]))+1
		if c>>5&3 >= 2 {
			x.raw++ // with properties
		}
	}
	x.block += x.raw
	return nil
}

// index reads the index after the blocks, and the end of the stream.
func (x *xzReader) index() error {
	size := int64(1) // the first byte has been read
	number := func() (n uint64, err error) {
		for shift := 0; ; shift += 7 {
			b, err := x.look(1)
			if err != nil || shift > 56 {
				return 0, errors.Join(errXZ, err)
			}
			size++
			if n |= uint64(b[0]&0x7f) << shift; b[0] < 0x80 {
				return n, nil
			}
		}
	}
	records, err := number()
	if err != nil || records > math.MaxInt32 {
		return errors.Join(errXZ, err)
	}
	x.next = x.streamHeader
	for range records * 2 {
		if _, err := number(); err != nil {
			return err
		}
		if len(x.pending) > maxIndex {
			return errXZ
		}
	}
	x.raw = (4-size%4)%4 + 4 + 12
	return nil
}

// maxIndex bounds the index of a file, in bytes: all of it is in memory at once.
const maxIndex = 4 << 20
