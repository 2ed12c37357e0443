package agent

// InputRequest writes Data, which may be empty, to the stdin of a process and waits for its answer, in one round trip.
type InputRequest struct {
	Process string `json:"process"`
	Data    []byte `json:"data,omitempty"` // at most MaxInput bytes
	EOF     bool   `json:"eof,omitempty"`
	// WaitMS is how long to wait at most. SettleMS is how long the process must be silent for its answer to be complete; without a terminal
	// it is a third of that.
	WaitMS   int64 `json:"wait_ms,omitempty"`
	SettleMS int64 `json:"settle_ms,omitempty"`
	// Window selects from the answer; with a negative offset the answer is the output from now on.
	Window Window `json:"window"`
}

// InputResult is the answer of a process. Blocked means that the process took only the first Written bytes of the input.
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

// StreamName returns the name of an output stream for callers.
func StreamName(stream int) string {
	if stream == OnStderr {
		return "stderr"
	}
	return "stdout"
}
