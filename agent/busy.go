package agent

import (
	"context"
)

// BusyRequest asks whether the sandbox is busy. With Known, the answer comes only when it differs from Known.
type BusyRequest struct {
	Known *bool `json:"known,omitempty"`
}

// BusyResult is the answer. It may equal Known if the machine is about to be paused.
type BusyResult struct {
	Busy bool `json:"going"`
}

// Busy reports whether processes, transfers or connections in the sandbox have been active for some 10 ms; with known, it waits for that
// to change. It does not count as use of the sandbox.
func (c *Client) Busy(ctx context.Context, known *bool) (bool, error) {
	r, err := Call[BusyResult](ctx, c, CallBusy, BusyRequest{Known: known})
	return r.Busy, err
}
