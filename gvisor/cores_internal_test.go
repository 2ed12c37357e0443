package gvisor

import (
	"slices"
	"testing"
)

func TestChooseCores(t *testing.T) {
	four := []int{0, 1, 4, 5}
	for _, test := range []struct {
		mine    []int
		all     int
		limit   float64
		first   int
		want    []int
		unbound bool
	}{
		{four, 4, 0, 0, four, true},
		{four, 4, 4, 2, []int{4, 5, 0, 1}, true},
		{four, 4, 100, 7, []int{5, 0, 1, 4}, true},
		{four, 4, 0.5, 1, []int{1}, false},
		{four, 4, 1, 4, []int{0}, false},
		{four, 4, 1.5, 3, []int{5, 0}, false},
		{four[:2], 4, 3, 1, []int{1, 0}, false}, // the server has fewer than at its start
		{four, 2, 2, 0, []int{0, 1}, false},     // it has more
		{four[:1], 1, 2, 9, []int{0}, true},
		{nil, 8, 2, 3, nil, false}, // the kernel does not say which
		{nil, 2, 2, 3, nil, true},
	} {
		if got, unbound := chooseCores(test.mine, test.all, test.limit, test.first); !slices.Equal(got, test.want) ||
			unbound != test.unbound {
			t.Errorf("%+v: got %v, %v", test, got, unbound)
		}
	}
}
