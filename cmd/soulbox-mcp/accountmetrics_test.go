package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"soulbox.dev/soulbox/access"
)

// TestAccountMetrics: metrics report what owners use, for a bounded number of owners, whatever their names.
func TestAccountMetrics(t *testing.T) {
	a := access.NewAccounts(map[access.Resource]access.Bound{access.Buffers: {Total: 1e6, Share: 1000}})
	take := func(owner string, n int64) {
		if _, err := a.Take(owner, access.Buffers, n); err != nil {
			t.Fatal(err)
		}
	}
	take("", 900)
	take("local", 50) // the same label
	take("oidc:\xff\n\"evil\"", 800)
	for i := range 150 {
		take(fmt.Sprint("owner", i), 2)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(accountUses{a})
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	for _, f := range families {
		for _, m := range f.Metric {
			line := f.GetName()
			for _, l := range m.Label {
				line += " " + l.GetValue()
			}
			told = append(told, fmt.Sprint(line, " ", m.Gauge.GetValue()))
		}
	}
	all := strings.Join(told, "\n")
	for _, want := range []string{"soulbox_account_used local buffers 950", "soulbox_account_used oidc:___evil_ buffers 800",
		"soulbox_account_used (others) buffers 106", "soulbox_account_share buffers 1000"} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is missing in\n%s", want, all)
		}
	}
	if len(told) > maxOwners+3 {
		t.Errorf("%d lines", len(told))
	}
}
