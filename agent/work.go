package agent

import (
	"context"
)

// WorkRequest asks whether the sandbox is at work. With Known the answer comes when it is other than that.
type WorkRequest struct {
	Known *bool `json:"known,omitempty"`
}

// WorkResult is the answer; it may be what was known, where the machine is about to stand still.
type WorkResult struct {
	Going bool `json:"going"`
}

// AtWork tells whether something goes on in the sandbox that has lasted for some 10 ms, processes or transfers; with known, it waits for a
// change of that. It is no use of the sandbox.
func (c *Client) AtWork(ctx context.Context, known *bool) (bool, error) {
	r, err := Call[WorkResult](ctx, c, CallWork, WorkRequest{Known: known})
	return r.Going, err
}
