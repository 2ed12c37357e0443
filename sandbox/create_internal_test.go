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

// TestGranted: a sandbox gets no more cores than there are, whoever asked for them; but what begins from a memory gets what that has.
func TestGranted(t *testing.T) {
	m := &Manager{opts: Options{Cores: 4, Defaults: DefaultLimits()}}
	many := DefaultLimits()
	many.CPU = 64
	saved := Template{Limits: many, Start: &StartCommand{Saved: "saved", Limits: many}}
	for what, test := range map[string]struct {
		asked    CreateOptions
		template Template
		want     float64
	}{
		"nothing": {want: 2}, "half a core": {asked: CreateOptions{Limits: Limits{CPU: 0.5}}, want: 0.5},
		"all": {asked: CreateOptions{Limits: Limits{CPU: 4}}, want: 4}, "more": {asked: CreateOptions{Limits: Limits{CPU: 4.5}}, want: 4},
		"a template": {template: Template{Limits: Limits{CPU: 64}}, want: 4},
		"a memory":   {asked: CreateOptions{Limits: many, whole: true}, want: 64},
		"files":      {asked: CreateOptions{Limits: many, from: "checkpoint"}, want: 4}, "a saved service": {template: saved, want: 64},
		"a saved service that has a network": {asked: CreateOptions{Limits: many}, template: Template{Limits: many,
			Start: &StartCommand{Saved: "saved", Limits: many, Network: true}}, want: 4},
		"more than a saved service": {asked: CreateOptions{Limits: Limits{CPU: 100}}, template: saved, want: 4},
	} {
		if got := m.granted(test.asked, test.template).CPU; got != test.want {
			t.Errorf("%s: %g cores, want %g", what, got, test.want)
		}
	}
	m.opts.Cores = 1
	if got := m.granted(CreateOptions{}, Template{}).CPU; got != 1 {
		t.Errorf("the default is %g of one core", got)
	}
}
