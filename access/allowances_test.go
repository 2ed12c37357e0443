package access_test

import (
	"fmt"
	"testing"

	"soulbox.dev/soulbox/access"
)

// TestAllowances: what one owner has used up another still has, all owners together have four times as much, and what is given back, also
// twice, can be taken once.
func TestAllowances(t *testing.T) {
	for name, test := range map[string]struct {
		most int // of one owner
		all  bool
		take func(a *access.Allowances, owner string) (done func(), ok bool)
	}{
		"bodies of known size": {64, true, func(a *access.Allowances, owner string) (func(), bool) { return a.MayRead(owner, 1<<20) }},
		"bodies of any size":   {16, true, func(a *access.Allowances, owner string) (func(), bool) { return a.MayRead(owner, -1) }},
		"bodies too large":     {16, true, func(a *access.Allowances, owner string) (func(), bool) { return a.MayRead(owner, 1<<40) }},
		"calls":                {3, false, func(a *access.Allowances, owner string) (func(), bool) { return a.MayCall(owner) }},
		"sessions":             {2500, true, func(a *access.Allowances, owner string) (func(), bool) { return a.MayOpen(owner) }},
	} {
		t.Run(name, func(t *testing.T) {
			a := &access.Allowances{Calls: 3}
			var last func()
			for n := range 4 * test.most {
				owner := fmt.Sprint("owner ", n/test.most)
				done, ok := test.take(a, owner)
				if !ok {
					t.Fatalf("%s is refused after %d", owner, n)
				}
				if last = done; n%test.most == test.most-1 {
					if _, ok := test.take(a, owner); ok {
						t.Fatalf("%s may take more than %d", owner, test.most)
					}
				}
			}
			if _, ok := test.take(a, "another"); ok == test.all {
				t.Fatal("when four owners have taken all they may, a fifth gets:", ok)
			}
			last()
			last()
			if _, ok := test.take(a, "owner 3"); !ok {
				t.Fatal("what was given back is lost")
			}
			if _, ok := test.take(a, "owner 3"); ok {
				t.Fatal("what was given back twice is there twice")
			}
		})
	}
}

// TestRate: an owner may ask for so much at once, and no more; another is not disturbed.
func TestRate(t *testing.T) {
	a := &access.Allowances{Rate: 1e-9} // nothing comes back while the test runs
	asked := 0
	for a.MayAsk("ann") {
		asked++
	}
	if asked != 1000 || !a.MayAsk("bob") {
		t.Fatal(asked)
	}
}
