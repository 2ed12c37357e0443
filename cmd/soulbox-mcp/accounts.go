package main

import (
	"runtime"

	"soulbox.dev/soulbox/access"
)

// accounts are what the owners of one server may use of it. The shares leave room for others; what health, kill, pause and the operator need is
// never taken from an account.
func accounts() *access.Accounts {
	cores := int64(runtime.NumCPU())
	return access.NewAccounts(map[access.Resource]access.Bound{
		access.Buffers:     {Total: 512 << 20, Share: 128 << 20},
		access.Work:        {Total: 2 * cores, Share: cores},
		access.Builds:      {Total: 4 * cores, Share: 4},
		access.Merges:      {Total: 2 * cores, Share: cores},
		access.Connections: {Total: 8192, Share: 2048},
		access.Tasks:       {Total: 200_000, Share: 100_000},
	})
}
