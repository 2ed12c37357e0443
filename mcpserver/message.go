package mcpserver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/mark3labs/mcp-go/mcp"
)

// JSON-RPC 2.0 error codes, and those of MCP 2026-07-28.
const (
	codeParse      = mcp.PARSE_ERROR
	codeInvalid    = mcp.INVALID_REQUEST
	codeNoMethod   = mcp.METHOD_NOT_FOUND
	codeParams     = mcp.INVALID_PARAMS
	codeInternal   = mcp.INTERNAL_ERROR
	codeBusy       = -32000 // in the range for implementations
	codeNoResource = mcp.RESOURCE_NOT_FOUND
	codeCapability = mcp.MISSING_REQUIRED_CLIENT_CAPABILITY
)

// Error is a protocol error, which the client gets unchanged.
type Error struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
	Data    any    `json:"data,omitempty"`
}

// Error implements error.
func (e *Error) Error() string { return e.Message }

// asError turns any error into a protocol error.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	var other interface {
		ProtocolError() (code int, message string)
	}
	if errors.As(err, &other) {
		code, text := other.ProtocolError()
		return &Error{Code: code, Message: text}
	}
	return &Error{Code: codeInternal, Message: err.Error()}
}

// maxDepth bounds the nesting of what a client sends.
const maxDepth = 64

// message is the part of a JSON-RPC message that this package needs.
type message struct {
	Method string          `json:"method"`
	ID     json.RawMessage `json:"id"`
	Result json.RawMessage `json:"result"`
	Error  *Error          `json:"error"`
	Params json.RawMessage `json:"params"`

	head params // of Params
}

// params is the part of a request's params that this package needs.
type params struct {
	Name string          `json:"name"`
	URI  string          `json:"uri"`
	Task json.RawMessage `json:"task"`
	Ref  struct {
		Type string `json:"type"`
	} `json:"ref"`
	TaskID         string                     `json:"taskId"`
	InputResponses map[string]json.RawMessage `json:"inputResponses"`
	Meta           struct {
		Version      string          `json:"io.modelcontextprotocol/protocolVersion"`
		Client       json.RawMessage `json:"io.modelcontextprotocol/clientInfo"`
		Capabilities json.RawMessage `json:"io.modelcontextprotocol/clientCapabilities"`
	} `json:"_meta"`
}

func (m message) isRequest() bool { return m.Method != "" && m.hasID() }
func (m message) hasID() bool     { return len(m.ID) > 0 && string(m.ID) != "null" }

// key is the id as the client spells it; 1 and "1" differ.
func (m message) key() string { return string(m.ID) }

// modern reports whether the message belongs to the era that began with 2026-07-28, in which each request is self-contained.
func (m message) modern() bool { return mcp.IsModernProtocol(m.head.Meta.Version) }

// tool is the tool that a request calls.
func (m message) tool() string {
	if m.Method == string(mcp.MethodToolsCall) {
		return m.head.Name
	}
	return ""
}

func (m message) completesResource() bool { return m.head.Ref.Type == "ref/resource" }

var errBatch = errors.New("batches are not supported; send one message at a time")

// parse reads one message and checks its shape.
func parse(line []byte) (message, error) {
	var m message
	if err := checkDepth(line); err != nil {
		return m, err
	}
	if line[0] == '[' {
		return m, errBatch
	}
	if err := json.Unmarshal(line, &m); err != nil {
		return m, errors.New("this is not a JSON-RPC message: send one object with jsonrpc, method and, for a request, id")
	}
	if m.Method == "" && m.Result == nil && m.Error == nil {
		return m, errors.New("the message has no method")
	}
	if m.hasID() && m.ID[0] != '"' && m.ID[0] != '-' && (m.ID[0] < '0' || m.ID[0] > '9') {
		return message{}, errors.New("the id is neither a string nor a number")
	}
	if len(m.Params) > 0 && m.Params[0] == '{' {
		_ = json.Unmarshal(m.Params, &m.head) // fields of the wrong type stay empty; the code that needs them reports it
	}
	return m, nil
}

// checkModern checks the fields that every request of 2026-07-28 must have. For the methods that mcp-go answers, mcp-go checks them.
func checkModern(m message) *Error {
	if !m.modern() {
		return nil
	}
	if !mcp.IsValidProtocolVersion(m.head.Meta.Version) {
		e := mcp.UnsupportedProtocolVersionError{Version: m.head.Meta.Version, Supported: mcp.ValidProtocolVersions}.JSONRPCError().Error
		return &Error{Code: e.Code, Message: e.Message, Data: e.Data}
	}
	if c := m.head.Meta.Capabilities; len(c) == 0 || c[0] != '{' {
		return &Error{Code: codeParams, Message: "missing or invalid _meta field " + mcp.MetaKeyClientCapabilities}
	}
	return nil
}

// checkDepth bounds the nesting without decoding anything.
func checkDepth(line []byte) error {
	depth, inString, escaped := 0, false, false
	for _, c := range line {
		switch {
		case escaped:
			escaped = false
		case inString:
			escaped, inString = c == '\\', c != '"'
		case c == '"':
			inString = true
		case c == '[' || c == '{':
			if depth++; depth > maxDepth {
				return fmt.Errorf("the message is nested deeper than %d levels", maxDepth)
			}
		case c == ']' || c == '}':
			depth--
		}
	}
	return nil
}

// encode writes v as one line, without the escapes that only HTML needs.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// failure is an error response.
func failure(id json.RawMessage, e *Error) mcp.JSONRPCError {
	if len(id) == 0 {
		id = json.RawMessage("null")
	}
	return mcp.JSONRPCError{JSONRPC: mcp.JSONRPC_VERSION, ID: mcp.NewRequestId(id),
		Error: mcp.NewJSONRPCErrorDetails(e.Code, e.Message, e.Data)}
}

// note is a message that needs no answer, or with an ID a question, which needs one.
type note struct {
	JSONRPC string `json:"jsonrpc"`
	ID      string `json:"id,omitempty"`
	Method  string `json:"method"`
	Params  any    `json:"params,omitempty"`
}

func newNote(method string, params any) note {
	return note{JSONRPC: mcp.JSONRPC_VERSION, Method: method, Params: params}
}
