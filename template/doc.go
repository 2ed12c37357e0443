// Package template makes the root file systems of sandboxes. The template "host" is a read-only view of this machine's programs (host.go).
// All others are images: OCI layers that were built, pulled or bootstrapped, and one EROFS file that merges them, from which sandboxes
// boot.
//
// State is files, in Store.Dir:
//
//	names/HASH.json     a template: its owner, its name, its layers and its defaults (Manifest)
//	layers/DIGEST       a layer as it was received or made, a compressed tar
//	images/CHAIN.erofs  the merged layers, named by their chain ID; made if missing
//	steps/KEY.json      what a step of a build has made
//	started/ID/         a saved sandbox of a template, in which its service runs
//	builds/ID/          a build's log
//	caches/, uploads/   what RUN --mount=type=cache keeps, and what was sent for builds
//	jobs/               what running builds, imports and pulls need, on all servers
//	host-…              the root of the host template
//
// A file is complete when it has its final name. Until then its maker locks it, and it is removed once the maker is dead (temp.go). A job
// declares what it needs under the lock that Collect also takes (job.go, collect.go), so what nothing needs can be removed at once. The
// store has a budget (space.go), and each owner's account pays for the owner's work.
//
// Nothing is ever unpacked on the host: layers are streamed into images (layer.go), and a build changes files only in a sandbox (build.go).
package template
