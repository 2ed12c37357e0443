package main

import (
	"io"
	"net/http"
	"time"

	"github.com/mark3labs/mcp-go/server"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"soulbox.dev/soulbox/sandbox"
)

// metrics are what Prometheus collects. No label has a value that a client or a guest can choose.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	latency  *prometheus.HistogramVec
	changes  *prometheus.CounterVec
	change   *prometheus.HistogramVec
	ping     prometheus.Histogram
	bytes    *prometheus.CounterVec
}

func newMetrics() *metrics {
	fast := prometheus.ExponentialBuckets(0.0005, 2, 18) // 0.5 ms to a minute
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "soulbox_mcp_requests_total",
			Help: "MCP requests answered, by method, tool and outcome (ok, error, refused, cancelled)."},
			[]string{"method", "tool", "outcome"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "soulbox_mcp_request_seconds",
			Help: "Time to answer an MCP request, by method and tool; tool exec is the latency of commands.", Buckets: fast},
			[]string{"method", "tool"}),
		changes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "soulbox_sandbox_operations_total",
			Help: "Changes of sandboxes, by what was done (create, pause, resume, snapshot, fork) and outcome (ok, error)."},
			[]string{"operation", "outcome"}),
		change: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "soulbox_sandbox_operation_seconds",
			Help: "Time that a change of a sandbox took, by what was done.", Buckets: fast}, []string{"operation"}),
		ping: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "soulbox_agent_round_trip_seconds",
			Help: "Time in which the agents of sandboxes answered.", Buckets: fast}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "soulbox_http_bytes_total",
			Help: "Bytes of MCP requests (in) and answers (out) over HTTP."}, []string{"direction"}),
	}
	m.registry.MustRegister(m.bytes, m.requests, m.latency, m.changes, m.change, m.ping, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// watch adds the metrics that are computed only when they are collected.
func (m *metrics) watch(manager *sandbox.Manager, d *descriptorBudget, sessions func() int) {
	m.registry.MustRegister(sandboxMetrics{manager}, accountUses{manager.Accounts()}, descriptorUse{d},
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "soulbox_http_sessions", Help: "MCP sessions over HTTP."},
			func() float64 { return float64(sessions()) }))
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second})
}

// known are the methods of MCP; any other method counts as "other".
var known = map[string]bool{
	"initialize": true, "ping": true, "server/discover": true, "tools/list": true, "tools/call": true, "prompts/list": true,
	"prompts/get": true, "resources/list": true,
	"resources/templates/list": true, "resources/read": true, "resources/subscribe": true, "resources/unsubscribe": true,
	"subscriptions/listen": true,
	"completion/complete":  true, "logging/setLevel": true, "tasks/get": true, "tasks/update": true, "tasks/cancel": true,
}

func (m *metrics) observeRequest(s *server.MCPServer, method, tool, outcome string, took time.Duration) {
	if !known[method] {
		method = "other"
	}
	if tool != "" && s.GetTool(tool) == nil {
		tool = "other"
	}
	m.requests.WithLabelValues(method, tool, outcome).Inc()
	m.latency.WithLabelValues(method, tool).Observe(took.Seconds())
}

func (m *metrics) observeSandbox(what string, took time.Duration, err error) {
	if what == "ping" {
		if err == nil {
			m.ping.Observe(took.Seconds())
		}
		return
	}
	outcome := "ok"
	if err != nil {
		outcome = "error"
	} else {
		m.change.WithLabelValues(what).Observe(took.Seconds())
	}
	m.changes.WithLabelValues(what, outcome).Inc()
}

// sandboxMetrics collects the sandboxes by state, and the memory that is left.
type sandboxMetrics struct{ manager *sandbox.Manager }

var (
	sandboxesDesc = prometheus.NewDesc("soulbox_sandboxes", "Sandboxes, by state; ended ones as long as they are remembered.",
		[]string{"state"}, nil)
	runDesc = prometheus.NewDesc("soulbox_sandboxes_running_seconds_total", "Time that sandboxes have run, including ended ones.",
		nil, nil)
	cpuDesc    = prometheus.NewDesc("soulbox_sandboxes_cpu_seconds_total", "CPU time of sandboxes, as last measured.", nil, nil)
	memoryDesc = prometheus.NewDesc("soulbox_sandboxes_memory_gb_seconds_total",
		"Memory promised to sandboxes times how long they have run, in 2^30 bytes.", nil, nil)
	netDesc = prometheus.NewDesc("soulbox_sandboxes_port_bytes_total", "Bytes through ports of sandboxes, in to them and out.",
		[]string{"direction"}, nil)
	usedDesc = prometheus.NewDesc("soulbox_sandboxes_memory_bytes", "Memory that running sandboxes use, as last measured.", nil, nil)
	diskDesc = prometheus.NewDesc("soulbox_sandboxes_disk_bytes",
		"Bytes that running sandboxes have written to their disks and not removed, as last measured.", nil, nil)
	tasksDesc = prometheus.NewDesc("soulbox_sandboxes_processes", "Processes of running sandboxes, as last measured.", nil, nil)
	savedDesc = prometheus.NewDesc("soulbox_saved_bytes", "Bytes on disk of all paused sandboxes and snapshots.", nil, nil)
	freeDesc  = prometheus.NewDesc("soulbox_memory_free_bytes", "Memory that can still be promised to sandboxes.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c sandboxMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{sandboxesDesc, freeDesc, runDesc, cpuDesc, memoryDesc, netDesc, usedDesc, diskDesc, tasksDesc,
		savedDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c sandboxMetrics) Collect(ch chan<- prometheus.Metric) {
	free, err := c.manager.FreeMemory()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(freeDesc, err)
		return
	}
	now, saved, err := c.manager.Now()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(savedDesc, err)
		return
	}
	for d, v := range map[*prometheus.Desc]int64{usedDesc: now.Memory, diskDesc: now.DiskUsed, tasksDesc: now.Processes, savedDesc: saved} {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v))
	}
	used := c.manager.Used()
	for d, v := range map[*prometheus.Desc]float64{runDesc: float64(used.RunMS) / 1000, cpuDesc: float64(used.CPUMS) / 1000,
		memoryDesc: used.GBSeconds} {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v)
	}
	ch <- prometheus.MustNewConstMetric(netDesc, prometheus.CounterValue, float64(used.NetIn), "in")
	ch <- prometheus.MustNewConstMetric(netDesc, prometheus.CounterValue, float64(used.NetOut), "out")
	ch <- prometheus.MustNewConstMetric(freeDesc, prometheus.GaugeValue, float64(free))
	states := c.manager.CountStates()
	for _, s := range sandbox.States() {
		ch <- prometheus.MustNewConstMetric(sandboxesDesc, prometheus.GaugeValue, float64(states[s]), string(s))
	}
}

// count counts the bytes of requests and answers.
func (m *metrics) count(next http.Handler) http.Handler {
	in, out := m.bytes.WithLabelValues("in"), m.bytes.WithLabelValues("out")
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = countedBody{r.Body, in}
		next.ServeHTTP(countedWriter{w, out}, r)
	})
}

type countedBody struct {
	io.ReadCloser
	n prometheus.Counter
}

// Read implements io.Reader.
func (c countedBody) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(float64(n))
	return n, err
}

type countedWriter struct {
	http.ResponseWriter
	n prometheus.Counter
}

// Write implements io.Writer.
func (c countedWriter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n.Add(float64(n))
	return n, err
}

// Unwrap lets http.ResponseController find deadlines and flushing.
func (c countedWriter) Unwrap() http.ResponseWriter { return c.ResponseWriter }
