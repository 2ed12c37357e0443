package tools

import (
	"context"
	"fmt"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

func (s *Toolbox) portTools() []tool {
	return []tool{
		define(s, "port_expose", "Make a TCP port of the sandbox reachable: returns a URL on the host's loopback.",
			hints{title: "Expose a port", idempotent: true}, s.portExpose),
		define(s, "port_close", "Undo port_expose, and end the connections to the port.",
			hints{title: "Close a port", destructive: true, idempotent: true}, s.portClose),
	}
}

type portExposeInput struct {
	Port   int   `json:"port" jsonschema:"of a server in the sandbox, on 127.0.0.1 or 0.0.0.0"`
	WaitMS int64 `json:"wait_ms,omitempty" jsonschema:"wait until something listens, up to 50000; default 5000"`
	Public bool  `json:"public,omitempty" jsonschema:"open to everyone"`
	target
}

type portExposeOutput struct {
	SandboxID string `json:"sandbox_id"`
	Port      int    `json:"port"`
	URL       string `json:"url" jsonschema:"for HTTP; other protocols use its host and port"`
	Listening bool   `json:"listening" jsonschema:"something listens on the port"`
}

func (o portExposeOutput) text() string {
	text := fmt.Sprintf("Port %d of sandbox %s is at %s.", o.Port, o.SandboxID, o.URL)
	if !o.Listening {
		text += " Nothing listens there yet: start a server with exec and background, and look at its output with process_wait."
	}
	return text
}

func (s *Toolbox) portExpose(ctx context.Context, in portExposeInput) (portExposeOutput, error) {
	wait := 5 * time.Second
	if in.WaitMS != 0 {
		if in.WaitMS < 0 || in.WaitMS > maxYield {
			return portExposeOutput{}, badArgument("The argument \"wait_ms\" must be from 0 to %d.", maxYield)
		}
		wait = time.Duration(in.WaitMS) * time.Millisecond
	}
	sb, err := s.sandbox(ctx, in.SandboxID)
	if err != nil {
		return portExposeOutput{}, err
	}
	p, err := sb.Expose(in.Port, in.Public)
	if err != nil {
		return portExposeOutput{}, err
	}
	listening, err := sb.AwaitPort(ctx, in.Port, wait)
	return portExposeOutput{SandboxID: sb.ID(), Port: p.Port, URL: s.portURL(sb, p), Listening: listening}, err
}

type portCloseInput struct {
	Port int `json:"port"`
	target
}

type portCloseOutput struct {
	SandboxID string `json:"sandbox_id"`
	Port      int    `json:"port"`
}

func (o portCloseOutput) text() string {
	return fmt.Sprintf("Port %d of sandbox %s is no longer exposed.", o.Port, o.SandboxID)
}

func (s *Toolbox) portClose(ctx context.Context, in portCloseInput) (portCloseOutput, error) {
	sb, err := s.sandbox(ctx, in.SandboxID)
	if err != nil {
		return portCloseOutput{}, err
	}
	return portCloseOutput{sb.ID(), in.Port}, sb.Unexpose(in.Port)
}

// portURL is where the user reaches a port: through the gateway if there is one, else on this machine's loopback.
func (s *Toolbox) portURL(sb *sandbox.Sandbox, p sandbox.Port) string {
	if s.PortURL != nil {
		return s.PortURL(sb, p)
	}
	return "http://" + p.Address()
}
