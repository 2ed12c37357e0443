package agent

import (
	"context"
)

// Restored is the generation of the machine: how often it was restored from a saved state.
type Restored struct {
	Generation int64 `json:"generation"`
}

// Restored tells the agent that its machine was restored from a saved state. The error of an older agent is ErrVersion.
func (c *Client) Restored(ctx context.Context) (Restored, error) {
	return Call[Restored](ctx, c, CallRestored, struct{}{})
}
