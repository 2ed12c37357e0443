package main

import (
	"cmp"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"soulbox.dev/soulbox/access"
)

// accountUses collects how much of the server's own resources each owner uses.
type accountUses struct{ accounts *access.Accounts }

// descriptorUse collects the server's descriptors.
type descriptorUse struct{ budget *descriptorBudget }

const (
	maxOwners   = 100 // owners with a label of their own: those who use most of a resource
	otherOwners = "(others)"
	maxLabel    = 64
)

var (
	accountUsedDesc = prometheus.NewDesc("soulbox_account_used",
		"What an owner uses of a resource of the server; owners beyond 100 count as one, (others).", []string{"resource", "owner"}, nil)
	accountShareDesc = prometheus.NewDesc("soulbox_account_share",
		"What one owner may use of a resource of the server, if it is used; 0 is unbounded.", []string{"resource"}, nil)
	descriptorsDesc = prometheus.NewDesc("soulbox_descriptors",
		"File descriptors of the server: used, limit, the reserve that connections leave, and connections.", []string{"kind"}, nil)
)

// Describe implements prometheus.Collector.
func (accountUses) Describe(ch chan<- *prometheus.Desc) {
	ch <- accountUsedDesc
	ch <- accountShareDesc
}

// Collect implements prometheus.Collector.
func (a accountUses) Collect(ch chan<- prometheus.Metric) {
	byResource := map[access.Resource][]access.Use{}
	for _, u := range a.accounts.Uses() {
		byResource[u.Resource] = append(byResource[u.Resource], u)
	}
	for resource, uses := range byResource {
		slices.SortStableFunc(uses, func(x, y access.Use) int { return cmp.Compare(y.Used, x.Used) })
		sums := map[string]int64{} // two names may give the same label
		for i, u := range uses {
			name := otherOwners
			if i < maxOwners {
				name = ownerLabel(u.Owner)
			}
			sums[name] += u.Used
		}
		for name, used := range sums {
			ch <- prometheus.MustNewConstMetric(accountUsedDesc, prometheus.GaugeValue, float64(used), string(resource), name)
		}
		ch <- prometheus.MustNewConstMetric(accountShareDesc, prometheus.GaugeValue, float64(uses[0].Share), string(resource))
	}
}

// ownerLabel turns an owner's name into a label: a provider's names may contain any letters.
func ownerLabel(owner string) string {
	name := access.Name(owner)
	return strings.Map(func(r rune) rune {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', strings.ContainsRune("._@:-", r):
			return r
		}
		return '_'
	}, name[:min(len(name), maxLabel)])
}

// Describe implements prometheus.Collector.
func (descriptorUse) Describe(ch chan<- *prometheus.Desc) { ch <- descriptorsDesc }

// Collect implements prometheus.Collector.
func (d descriptorUse) Collect(ch chan<- prometheus.Metric) {
	s := d.budget.state()
	for kind, n := range map[string]int{"used": s.used, "limit": s.limit, "reserve": s.reserve, "connections": s.connections} {
		ch <- prometheus.MustNewConstMetric(descriptorsDesc, prometheus.GaugeValue, float64(n), kind)
	}
}
