package guest

import (
	"encoding/binary"
	"io"
)

func writeFrame(w io.Writer, kind int, offset int64, body []byte) error {
	buf := make([]byte, 13, 13+len(body))
	buf[0] = byte(kind)
	binary.BigEndian.PutUint64(buf[1:], uint64(offset))
	binary.BigEndian.PutUint32(buf[9:], uint32(len(body)))
	_, err := w.Write(append(buf, body...))
	return err
}
