package agent

import (
	"errors"
	"io"
	"os"

	"github.com/hashicorp/yamux"
)

// serveRead sends a file.
func (s *Server) serveRead(stream *yamux.Stream, h header) {
	f, info, err := s.openRead(h)
	if err != nil {
		_ = writeMessage(stream, answer{Error: wireError(err)})
		return
	}
	defer f.Close()
	if err := writeMessage(stream, answer{Info: &info}); err != nil {
		return
	}
	giveUpOnClose(stream)
	var from io.Reader = f
	if h.Limit >= 0 {
		from = io.LimitReader(f, h.Limit)
	}
	src := &sourceReader{r: from}
	_, err = writeChunks(stream, src)
	if err != nil && src.err == nil {
		return // the host is gone
	}
	end := answer{}
	if src.err != nil {
		end.Error = wireError(src.err)
	}
	_ = endChunks(stream, end)
}

func (s *Server) openRead(h header) (*os.File, FileInfo, error) {
	if err := checkPath("read", h.Path); err != nil {
		return nil, FileInfo{}, err
	}
	f, err := openRegular(h.Path)
	if err != nil {
		return nil, FileInfo{}, err
	}
	st, err := f.Stat()
	if err == nil && h.Offset > 0 {
		_, err = f.Seek(h.Offset, io.SeekStart)
	}
	if err != nil {
		return nil, FileInfo{}, errors.Join(err, f.Close())
	}
	return f, describeFile(h.Path, st, s.ownerNames()), nil
}

// serveWrite receives a file. A replaced file is the old one until all has arrived, then the new one.
func (s *Server) serveWrite(stream *yamux.Stream, h header) {
	w, err := s.openWrite(h)
	if err != nil {
		_ = writeMessage(stream, answer{Error: wireError(err)})
		return
	}
	defer w.abort()
	if err := writeMessage(stream, answer{}); err != nil {
		return
	}
	if _, err = io.Copy(w, &chunkReader{r: stream}); err == nil {
		err = w.commit()
	}
	a := answer{}
	if err != nil {
		a.Error = wireError(err)
	} else if info, err := s.stat(PathRequest{Path: h.Path}); err != nil {
		a.Error = wireError(err)
	} else {
		a.Info = &info
	}
	_ = writeMessage(stream, a)
}
