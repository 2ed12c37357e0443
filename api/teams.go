package api

import (
	"net/http"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

// startWindow is the time over which the rate of starts is measured.
const startWindow = 5 * time.Minute

// teamMetric is how much of the server an owner uses.
type teamMetric struct {
	Timestamp  time.Time `json:"timestamp"`
	Unix       int64     `json:"timestampUnix"`
	Concurrent int       `json:"concurrentSandboxes"`
	StartRate  float64   `json:"sandboxStartRate"` // per second
}

// teamNow returns what the caller uses now.
func (c *Control) teamNow(r *call) (teamMetric, error) {
	if err := r.isTeam(r.PathValue("id")); err != nil {
		return teamMetric{}, err
	}
	c.Manager.AwaitSettled(r.Context())
	now := time.Now()
	out := teamMetric{Timestamp: now, Unix: now.Unix()}
	out.Concurrent = len(c.Manager.List(sandbox.Filter{Owner: r.owner, State: sandbox.Running}))
	started := 0
	for _, state := range []sandbox.State{sandbox.Running, sandbox.Paused, sandbox.Killed, sandbox.Failed} {
		started += len(c.Manager.List(sandbox.Filter{Owner: r.owner, State: state, Since: now.Add(-startWindow)}))
	}
	out.StartRate = float64(started) / startWindow.Seconds()
	return out, nil
}

// teamMetrics answers with what the caller uses now, if the requested time includes now. Earlier usage is not kept per owner.
func (c *Control) teamMetrics(r *call) error {
	from, until, err := r.period()
	if err != nil {
		return err
	}
	m, err := c.teamNow(r)
	if err != nil {
		return err
	}
	out := []teamMetric{}
	if m.Unix >= from && (until == 0 || m.Unix <= until) {
		out = append(out, m)
	}
	return r.answer(http.StatusOK, out)
}

// teamMaximum answers with the largest value of teamMetrics.
func (c *Control) teamMaximum(r *call) error {
	m, err := c.teamNow(r)
	if err != nil {
		return err
	}
	value := m.StartRate
	switch metric := r.URL.Query().Get("metric"); metric {
	case "concurrent_sandboxes":
		value = float64(m.Concurrent)
	case "sandbox_start_rate":
	default:
		return refuse(http.StatusBadRequest, "metric is concurrent_sandboxes or sandbox_start_rate, not %.40q", metric)
	}
	return r.answer(http.StatusOK, map[string]any{"timestamp": m.Timestamp, "timestampUnix": m.Unix, "value": value})
}
