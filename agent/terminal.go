package agent

// Bounds of a terminal's size.
const (
	maxRows = 300
	maxCols = 500
)

// Terminal is the size of a process's terminal, in characters.
type Terminal struct {
	Rows int `json:"rows"`
	Cols int `json:"cols"`
}

// Check returns an error if the size is not within its bounds.
func (t Terminal) Check() error {
	if t.Rows < 1 || t.Rows > maxRows || t.Cols < 1 || t.Cols > maxCols {
		return Invalid("a terminal has 1 to %d rows and 1 to %d columns, not %d and %d", maxRows, maxCols, t.Rows, t.Cols)
	}
	return nil
}
