// Package template makes the root file systems of sandboxes. The template "host" is a read-only view of this machine's programs (host.go);
// all others are images: layers, as OCI has them, that were built, pulled or bootstrapped, and one EROFS file of all of them together,
// which is what sandboxes boot from.
//
// State is files, in Store.Dir:
//
//	names/HASH.json     a template: whose it is, its name, its layers and its defaults (Manifest)
//	layers/DIGEST       a layer as it came or was made, a compressed tar
//	images/CHAIN.erofs  what some layers make together, named by their chain ID; made when it is missing
//	steps/KEY.json      what a step of a build has made
//	started/ID/         a sandbox of a template in which its service runs
//	builds/ID/          a build's log
//	caches/, uploads/   what RUN --mount=type=cache keeps, and what was sent for builds
//	jobs/               what builds, imports and pulls need that go on, of all servers
//	host-…              the root of the host template
//
// Every file is complete when it has its name; until then it is locked by its maker, and removed once that is dead (temp.go). Whoever needs
// something says so under the lock that Collect has, too (job.go, collect.go): so what nobody needs goes at once. The whole has a budget
// (room.go), and each owner's work is on his account.
//
// Nothing is ever unpacked on the host: layers are read as streams into images (layer.go), and what a build does, it does in a sandbox
// (build.go).
package template
