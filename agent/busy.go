package agent

import (
	"context"
)

// WorkRequest asks whether the sandbox is at work. With Known, the answer comes only when it differs from Known.
type WorkRequest struct {
	Known *bool `json:"known,omitempty"`
}

// WorkResult is the answer. It may equal Known if the machine is about to be paused.
type WorkResult struct {
	Going bool `json:"going"`
}

// AtWork reports whether processes, transfers or connections in the sandbox have been active for some 10 ms; with known, it waits for that
// to change. It does not count as use of the sandbox.
func (c *Client) AtWork(ctx context.Context, known *bool) (bool, error) {
	r, err := Call[WorkResult](ctx, c, CallWork, WorkRequest{Known: known})
	return r.Going, err
}
