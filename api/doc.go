// Package api is the HTTP face of the domain. So far it is the gateway: the ports of sandboxes by name of host.
package api
