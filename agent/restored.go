package agent

import (
	"context"
)

// Restored tells in which generation the machine is: how often it went on from what was saved.
type Restored struct {
	Generation int64 `json:"generation"`
}

// Restored tells the agent that its machine goes on from what was saved. An older agent is ErrVersion.
func (c *Client) Restored(ctx context.Context) (Restored, error) {
	return Call[Restored](ctx, c, CallRestored, struct{}{})
}
