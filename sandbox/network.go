package sandbox

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/idna"
)

// Modes of a Network.
const (
	NetworkNone      = "none"
	NetworkAllowlist = "allowlist"
	NetworkFull      = "full"
)

// Network says what a sandbox can reach on the network. It can never reach private addresses or this machine, whatever Network says.
//
// There is a proxy on the sandbox's loopback, which its environment names; programs that ignore the proxy have no network. The host
// resolves names, and checks the address of every connection.
type Network struct {
	Mode string `json:"mode"` // "" means none
	// Allow lists the domains ("example.com", "*.example.com" for all below it, "*" for all names) and address ranges of an allowlist; if
	// it is empty, nothing can be reached. In a full network, Deny lists address ranges that cannot be reached, and Allow the exceptions
	// from them.
	Allow []string `json:"allow,omitempty"`
	Deny  []string `json:"deny,omitempty"`
	// Said has the lists as a client whose API words them differently gave them, to show them again; it has no effect.
	Said *NetworkWords `json:"said,omitempty"`
}

// NetworkWords are the lists of a Network as a client gave them.
type NetworkWords struct {
	Allow []string `json:"allow,omitempty"`
	Deny  []string `json:"deny,omitempty"`
}

// On reports whether there is a network, even if nothing is allowed in it: what it allows can change.
func (n Network) On() bool { return n.Mode == NetworkFull || n.Mode == NetworkAllowlist }

// maxAllow bounds the entries of both lists together.
const maxAllow = 256

// check returns the network with its names in the form in which they are compared. Addresses and ranges stay as given.
func (n Network) check() (Network, error) {
	switch n.Mode {
	case "", NetworkNone, NetworkFull, NetworkAllowlist:
		if len(n.Allow) > 0 && n.Mode != NetworkAllowlist && len(n.Deny) == 0 {
			return n, fmt.Errorf("network: an allowlist needs the mode %q: %w", NetworkAllowlist, ErrInvalid)
		}
		if len(n.Deny) > 0 && n.Mode != NetworkFull {
			return n, fmt.Errorf("network: what is denied needs the mode %q: %w", NetworkFull, ErrInvalid)
		}
	default:
		return n, fmt.Errorf("network %q: it is none, allowlist or full: %w", n.Mode, ErrInvalid)
	}
	if all := len(n.Allow) + len(n.Deny); all > maxAllow {
		return n, fmt.Errorf("network: %d entries, at most %d are possible: %w", all, maxAllow, ErrInvalid)
	}
	if n.Said != nil {
		if all := len(n.Said.Allow) + len(n.Said.Deny); all > maxAllow {
			return n, fmt.Errorf("network: %d entries, at most %d are possible: %w", all, maxAllow, ErrInvalid)
		}
		if _, err := checkLists(n.Said.Allow, n.Said.Deny); err != nil {
			return n, err
		}
	}
	var err error
	n.Deny = slices.Clone(n.Deny)
	n.Allow, err = checkLists(n.Allow, n.Deny)
	return n, err
}

// checkLists returns the allowlist with its names in the form in which they are compared.
func checkLists(allow, deny []string) ([]string, error) {
	for _, entry := range deny {
		if _, err := parseRange(entry); err != nil {
			return nil, fmt.Errorf("network: %.100q is no range of addresses, such as 192.0.2.0/24, which alone can be denied: %w", entry,
				ErrInvalid)
		}
	}
	allow = slices.Clone(allow)
	for i, entry := range allow {
		if _, err := parseRange(entry); err == nil || entry == anyName {
			continue
		}
		below, wild := strings.CutPrefix(entry, "*.")
		name, err := hostName(below)
		if err != nil || !strings.Contains(name, ".") && !wild { // a name without a dot is not in the public DNS
			return nil, fmt.Errorf("network: %.300q is neither a domain, such as example.com or *.example.com, nor a range of addresses, "+
				"such as 192.0.2.0/24; a whole network is %q, no network %q: %w", entry, NetworkFull, NetworkNone, ErrInvalid)
		}
		if allow[i] = name; wild {
			allow[i] = "*." + name
		}
	}
	return allow, nil
}

// anyName is the entry of an allowlist that matches every name.
const anyName = "*"

func parseRange(text string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(text); err == nil {
		return netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	return p.Masked(), err
}

// hostName returns a domain in the form in which it is compared and resolved.
func hostName(text string) (string, error) {
	name, err := idna.Lookup.ToASCII(strings.TrimSuffix(text, "."))
	if err != nil || name == "" || len(name) > 253 || strings.Contains("."+name+".", "..") ||
		strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789.-_") != "" {
		return "", fmt.Errorf("%q is no name of a host: %w", text, ErrInvalid)
	}
	return name, nil
}

// permits reports whether a connection to a host is allowed; name is from hostName, or "" if the host is an address.
func (n Network) permits(name string, addr netip.Addr) bool {
	in := func(entry string) bool {
		p, err := parseRange(entry)
		return err == nil && addr.IsValid() && p.Contains(addr)
	}
	listed := slices.ContainsFunc(n.Allow, func(entry string) bool {
		below, wild := strings.CutPrefix(entry, "*")
		return in(entry) || name != "" && (name == entry || wild && strings.HasSuffix(name, below))
	})
	switch n.Mode {
	case NetworkAllowlist:
		return listed
	case NetworkFull:
		return listed || len(n.Deny) == 0 || addr.IsValid() && !slices.ContainsFunc(n.Deny, in)
	}
	return false
}

// network returns what the sandbox can reach now, and a context that ends when that changes.
func (s *Sandbox) network() (Network, context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rules == nil {
		s.rules, s.endRules = context.WithCancel(s.ctx)
	}
	return s.rec.Network, s.rules
}

// SetNetwork changes what a sandbox with a network can reach. It closes existing connections.
func (s *Sandbox) SetNetwork(n Network) error {
	n, err := n.check()
	if err != nil {
		return fmt.Errorf("update sandbox %s: %w", s.id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rec.State != Running && s.rec.State != Paused || s.isLeft() {
		return s.wrong("update")
	}
	if n.On() != s.rec.Network.On() {
		if !n.On() {
			return fmt.Errorf("update sandbox %s: its network cannot be removed; mode %q without entries blocks everything: %w", s.id,
				NetworkAllowlist, ErrInvalid)
		}
		return fmt.Errorf("update sandbox %s: it was made without a network and cannot get one; make another sandbox with a network: %w",
			s.id, ErrInvalid)
	}
	r := s.rec
	r.Network, r.Updated = n, time.Now()
	if err := s.commit(r); err != nil {
		return err
	}
	if s.rules != nil {
		s.endRules()
		s.rules = nil
	}
	s.logChange("its network was changed")
	return nil
}

// hasRanges reports whether a name may be allowed because of the address that it resolves to.
func (n Network) hasRanges() bool {
	return n.Mode == NetworkFull || n.Mode == NetworkAllowlist &&
		slices.ContainsFunc(n.Allow, func(entry string) bool { _, err := parseRange(entry); return err == nil })
}
