// Package gvisor is the sandbox.Runtime that drives runsc as an ordinary user. Each machine is one runsc sandbox in its own user namespace,
// with its own state directory (--root), so that a machine that hangs blocks no other. The package knows bundles, runsc's command line, its
// control socket and its processes; it does not know what runs in the sandbox, nor who owns it.
//
// A machine's directory (sandbox.Spec.Dir) holds: bundle/ (the OCI bundle), run/ (runsc's --root, with the control socket), disk/ (the
// upper layer of the root file system) and machine.json (what Attach and Reap need). A checkpoint is a directory with gVisor's image files
// and its own machine.json.
package gvisor
