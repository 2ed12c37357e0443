// Package guest is everything that runs in a sandbox: Server is its first process, which starts all others, keeps their output, and reads,
// writes and watches files for the host. It knows one machine, the one it runs in, and the protocol of package agent.
//
// Every process that a user asked for is a child of the Server, in its own session and its own cgroup; its output goes to a bounded spool
// that can be replayed from any offset.
//
// Lock order: Server.mu, then process.mu, then spool.mu.
package guest
