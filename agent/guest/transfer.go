package guest

import (
	"errors"
	"io"
	"os"

	"github.com/hashicorp/yamux"
	"soulbox.dev/soulbox/agent"
)

// serveRead sends a file.
func (s *Server) serveRead(stream *yamux.Stream, h agent.Header) {
	f, info, err := s.openRead(h)
	if err != nil {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(err)})
		return
	}
	defer f.Close()
	if err := agent.WriteMessage(stream, agent.Answer{Info: &info}); err != nil {
		return
	}
	giveUpOnClose(stream)
	var from io.Reader = f
	if h.Limit >= 0 {
		from = io.LimitReader(f, h.Limit)
	}
	src := &agent.SourceReader{R: from}
	_, err = agent.WriteChunks(stream, src)
	if err != nil && src.Err == nil {
		return // the host is gone
	}
	end := agent.Answer{}
	if src.Err != nil {
		end.Error = wireError(src.Err)
	}
	_ = agent.EndChunks(stream, end)
}

func (s *Server) openRead(h agent.Header) (*os.File, agent.FileInfo, error) {
	if err := checkPath("read", h.Path); err != nil {
		return nil, agent.FileInfo{}, err
	}
	f, err := openRegular(h.Path)
	if err != nil {
		return nil, agent.FileInfo{}, err
	}
	st, err := f.Stat()
	if err == nil && h.Offset > 0 {
		_, err = f.Seek(h.Offset, io.SeekStart)
	}
	if err != nil {
		return nil, agent.FileInfo{}, errors.Join(err, f.Close())
	}
	return f, describeFile(h.Path, st, s.ownerNames()), nil
}

// serveWrite receives a file. A file that is replaced keeps the old content until all of the new has arrived.
func (s *Server) serveWrite(stream *yamux.Stream, h agent.Header) {
	w, err := s.openWrite(h)
	if err != nil {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(err)})
		return
	}
	defer w.abort()
	if err := agent.WriteMessage(stream, agent.Answer{}); err != nil {
		return
	}
	if _, err = io.Copy(w, &agent.ChunkReader{R: stream}); err == nil {
		err = w.commit()
	}
	a := agent.Answer{}
	if err != nil {
		a.Error = wireError(err)
	} else if info, err := s.stat(agent.PathRequest{Path: h.Path}); err != nil {
		a.Error = wireError(err)
	} else {
		a.Info = &info
	}
	_ = agent.WriteMessage(stream, a)
}
