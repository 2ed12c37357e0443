package agent

// InputRequest writes to the stdin of a process, which may be nothing, and listens to what it answers, all in one round trip.
type InputRequest struct {
	Process string `json:"process"`
	Data    []byte `json:"data,omitempty"` // at most MaxInput bytes
	EOF     bool   `json:"eof,omitempty"`
	// WaitMS is how long to listen at most, SettleMS how long the process must be silent for its answer to be complete: without
	// a terminal a third of that.
	WaitMS   int64 `json:"wait_ms,omitempty"`
	SettleMS int64 `json:"settle_ms,omitempty"`
	// Window is of the answer; with a negative offset the answer is what comes from now on.
	Window Window `json:"window"`
}

// InputResult is what a process has answered. Blocked says that it did not take all of the input, but the first Written bytes.
type InputResult struct {
	Snapshot
	Offset  int64 `json:"offset"` // where the answer begins
	Written int64 `json:"written,omitempty"`
	Blocked bool  `json:"blocked,omitempty"`
}

// The output streams of a process, as its spool numbers them.
const (
	OnStdout = 0
	OnStderr = 1
)

// StreamName names an output stream as callers know it.
func StreamName(stream int) string {
	if stream == OnStderr {
		return "stderr"
	}
	return "stdout"
}
