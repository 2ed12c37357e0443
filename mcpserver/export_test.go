package mcpserver

import "time"

// SetBeat sets the time between two keep-alives on a stream.
func (o *HTTPOptions) SetBeat(beat time.Duration) { o.beat = beat }

// SetCalls sets how many calls of one conversation may run, and how many may run or wait.
func (o *Options) SetCalls(parallel, pending int) { o.parallel, o.pending = parallel, pending }

// WithDrain sets how long calls may run once the client has closed its end.
func (s Stdio) WithDrain(drain time.Duration) Stdio {
	s.drain = drain
	return s
}

// SetPatience sets how long to wait for a server that is away.
func (b *Bridge) SetPatience(patience time.Duration) { b.patience = patience }

// MaxMessage bounds the bytes of one message.
const MaxMessage = maxMessage
