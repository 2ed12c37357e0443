// Package sandbox is the domain: which sandboxes exist, who owns them, what state each one is in, how long it lives, and its limits. It
// does not know how a sandbox is run (a Runtime does) or what happens inside one (package agent acts there), and it knows nothing of MCP,
// HTTP or flags.
//
// State is files, in the state directory:
//
//	sandboxes/ID/   state.json, log.jsonl, metrics.jsonl, the Runtime's machine, checkpoint-N while it is on disk, and a lock file
//	                that the server that has the sandbox holds with flock. When the lock is free, the next server adopts what runs
//	                (adopt.go), ends what was half made, and leaves what is on disk to the first server that is asked for it.
//	ended/ID/       what is kept of an ended sandbox for a day: state, log and samples
//	snapshots/HASH/ snapshot.json and a checkpoint
//
// Every change between running and paused takes the sandbox's turn (pause.go); callers of Agent wait meanwhile. Every write goes through
// store.Disk, so that tests can stop it anywhere (TestPowerFails, TestCutAtEveryByte).
//
// A turn is taken while none of these locks is held. Whoever has a turn may wait for that of a sandbox that was on disk and is ended to
// make space (reserveDisk), and for no other. Locks are taken in this order, and two of one line never together:
//
//	capacity.mu with the flock .room; adoption.claiming
//	registry.mu; the flock sandboxes/.lock
//	adoption.mu; ports.mu
//	Sandbox.mu
//	journal.mu; meter.mu; copies.mu; tries.mu; snapshots.mu
//
// Those of the last line and adoption.mu are held only within their own type.
package sandbox
