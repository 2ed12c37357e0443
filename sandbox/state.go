package sandbox

import (
	"crypto/rand"
	"encoding/base32"
	"regexp"
	"slices"
	"strings"
)

// State is where a sandbox is in its life.
type State string

// The states; transitions says which state may follow which.
const (
	Creating State = "creating"
	Running  State = "running"
	Paused   State = "paused"
	Killed   State = "killed"
	Failed   State = "failed"
)

// transitions are the allowed changes of state.
var transitions = map[State][]State{
	Creating: {Running, Killed, Failed},
	Running:  {Paused, Killed, Failed},
	Paused:   {Running, Paused, Killed, Failed}, // from memory to disk
	Failed:   {Running, Killed},                 // from what was saved of it
}

func (s State) mayBecome(next State) bool { return slices.Contains(transitions[s], next) }

// Ended reports whether nothing of the sandbox runs and nothing resumes it by itself. A failed sandbox may have a saved copy, from which
// Resume starts it again.
func (s State) Ended() bool { return s == Killed || s == Failed }

// States lists all states in the order of a sandbox's life.
func States() []State { return []State{Creating, Running, Paused, Killed, Failed} }

var idPattern = regexp.MustCompile(`^[a-z0-9]{1,40}$`)

// ValidID reports whether a text has the form of a sandbox ID; only such a text ever becomes part of a path.
func ValidID(id string) bool { return idPattern.MatchString(id) }

// newID makes an ID that cannot be guessed: 100 random bits.
func newID() string {
	var random [13]byte
	rand.Read(random[:])
	return "sb" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(random[:]))[:20]
}
