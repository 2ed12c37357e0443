// Package gvisor is the sandbox.Runtime that drives runsc, as an ordinary user: each machine is one runsc sandbox in a user namespace
// of its own, with a state directory (--root) of its own, so that a wedged one blocks nobody else. It knows bundles, runsc's command
// line, its control socket and its processes; it does not know what runs in the sandbox, nor whose it is.
//
// A machine's directory (sandbox.Spec.Dir) holds: bundle/ (the OCI bundle), run/ (runsc's --root, with the control socket), disk/ (the
// upper layer of the root file system) and machine.json (what Attach and Reap need). A checkpoint is a directory with gVisor's image files
// and a machine.json of its own.
package gvisor
