package sandbox

import (
	"errors"
	"slices"
	"testing"
)

// TestUndoStack: steps are undone from the last to the first, each with the cause, also behind one that cannot be undone; the error tells
// all.
func TestUndoStack(t *testing.T) {
	cause, stuck := errors.New("cause"), errors.New("stuck")
	var undone []int
	step := func(n int, err error) func(error) error {
		return func(why error) error {
			if why != cause {
				t.Errorf("step %d is undone because of %v", n, why)
			}
			undone = append(undone, n)
			return err
		}
	}
	err := undoStack{step(1, nil), step(2, stuck), step(3, nil)}.run(cause)
	if !slices.Equal(undone, []int{3, 2, 1}) || !errors.Is(err, cause) || !errors.Is(err, stuck) {
		t.Error(undone, err)
	}
	if err := (undoStack{step(1, nil)}).run(cause); err != cause {
		t.Error(err)
	}
}
