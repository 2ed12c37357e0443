// Package template makes the root file systems of sandboxes. For now there is one template, "host": a read-only view of this machine's
// programs with a user and a home of its own. It knows files of the host; it does not know how a sandbox is run.
package template
