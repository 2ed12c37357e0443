package api

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"slices"

	"soulbox.dev/soulbox/sandbox"
)

// network is a sandbox's network, in and out, as clients describe it.
type network struct {
	AllowOut    []string        `json:"allowOut,omitempty"`
	DenyOut     []string        `json:"denyOut,omitempty"`
	EgressProxy json.RawMessage `json:"egressProxy,omitempty"`
	Rules       json.RawMessage `json:"rules,omitempty"`
	AllowPublic *bool           `json:"allowPublicTraffic,omitempty"`
	MaskHost    string          `json:"maskRequestHost,omitempty"`
	HTTPSPorts  []int           `json:"httpsPorts,omitempty"`
}

// everything is what a client denies in order to allow only what it lists.
var everything = []string{"0.0.0.0/0", "::/0"}

// egress returns what a sandbox may reach. Unless none is set, the sandbox always has a network, so that its rules can be changed later,
// even if they allow nothing at first.
func (n *network) egress(internet *bool, none bool) (sandbox.Network, error) {
	if n == nil {
		n = &network{}
	}
	if given(n.EgressProxy) {
		return sandbox.Network{}, refuse(http.StatusNotImplemented, "network.egressProxy: this server does not support egress proxies")
	}
	if given(n.Rules) && string(n.Rules) != "{}" {
		return sandbox.Network{}, refuse(http.StatusNotImplemented,
			"network.rules: this server does not change what sandboxes send; give them what they need as envs")
	}
	for _, d := range n.DenyOut {
		if _, err := netip.ParseAddr(d); err == nil {
			continue
		}
		if _, err := netip.ParsePrefix(d); err != nil {
			return sandbox.Network{}, refuse(http.StatusBadRequest,
				"invalid denied CIDR %.100s: only addresses and ranges of addresses can be denied", d)
		}
	}
	has := func(r string) bool { return slices.Contains(n.DenyOut, r) }
	all := has(everything[0]) || has("0.0.0.0/1") && has("128.0.0.0/1")
	named := slices.ContainsFunc(n.AllowOut, func(a string) bool {
		_, aerr := netip.ParseAddr(a)
		_, perr := netip.ParsePrefix(a)
		return aerr != nil && perr != nil && a != "*" // "*" allows nothing that is not allowed already
	})
	if named && !all && (internet == nil || *internet) {
		return sandbox.Network{}, refuse(http.StatusBadRequest,
			"when specifying allowed domains in allow out, you must include '0.0.0.0/0' in deny out to block all other traffic")
	}
	out := sandbox.Network{Mode: sandbox.NetworkFull}
	switch {
	case none && internet != nil && *internet || none && len(n.AllowOut) > 0:
		return out, refuse(http.StatusForbidden, "the operator of this server gives sandboxes no network")
	case none:
		return sandbox.Network{Mode: sandbox.NetworkNone}, nil
	case all, internet != nil && !*internet:
		out = sandbox.Network{Mode: sandbox.NetworkAllowlist, Allow: n.AllowOut}
	case len(n.DenyOut) > 0:
		out.Allow, out.Deny = n.AllowOut, n.DenyOut
	}
	if len(n.AllowOut)+len(n.DenyOut) > 0 {
		out.Said = &sandbox.NetworkWords{Allow: n.AllowOut, Deny: n.DenyOut}
	}
	return out, nil
}

// ingress returns who may reach a sandbox. By default, everyone who knows its id may.
func (n *network) ingress() sandbox.Ingress {
	in := sandbox.Ingress{Open: sandbox.OpenPublic}
	if n == nil {
		return in
	}
	if n.AllowPublic != nil && !*n.AllowPublic {
		in.Open = sandbox.OpenToken
	}
	in.Host, in.TLS = n.MaskHost, n.HTTPSPorts
	return in
}

// networkOf describes a sandbox's network in the words of clients.
func networkOf(i sandbox.Info) network {
	public := i.Ingress.Open == sandbox.OpenPublic
	n := network{AllowPublic: &public, MaskHost: i.Ingress.Host, HTTPSPorts: i.Ingress.TLS, AllowOut: i.Network.Allow,
		DenyOut: i.Network.Deny}
	if i.Network.Mode != sandbox.NetworkFull {
		n.DenyOut = everything[:1]
	}
	if said := i.Network.Said; said != nil {
		n.AllowOut, n.DenyOut = said.Allow, said.Deny
	}
	return n
}
