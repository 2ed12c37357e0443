package mcpserver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// JSON-RPC 2.0 error codes.
const (
	codeParse    = -32700
	codeInvalid  = -32600
	codeInternal = -32603
	codeBusy     = -32000 // of the range for implementations
)

// maxDepth bounds the nesting of what a client sends.
const maxDepth = 64

// message is the part of a JSON-RPC message that the loop needs.
type message struct {
	Method string          `json:"method"`
	ID     json.RawMessage `json:"id"`
	Result json.RawMessage `json:"result"`
	Error  json.RawMessage `json:"error"`
	Params json.RawMessage `json:"params"`
}

func (m message) isRequest() bool { return m.Method != "" && m.hasID() }
func (m message) hasID() bool     { return len(m.ID) > 0 && string(m.ID) != "null" }

// key is the id as the client spells it; 1 and "1" are two.
func (m message) key() string { return string(m.ID) }

var errBatch = errors.New("batches are not supported; send one message per line")

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
		return m, fmt.Errorf("this line is not a JSON-RPC message: %w", err)
	}
	if m.Method == "" && m.Result == nil && m.Error == nil {
		return m, errors.New("the message has no method")
	}
	if m.hasID() && m.ID[0] != '"' && m.ID[0] != '-' && (m.ID[0] < '0' || m.ID[0] > '9') {
		return message{}, errors.New("the id is neither a string nor a number")
	}
	return m, nil
}

// checkDepth bounds nesting without building anything.
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
func failure(id json.RawMessage, code int, text string) any {
	type detail struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}
	if len(id) == 0 {
		id = json.RawMessage("null")
	}
	return struct {
		JSONRPC string          `json:"jsonrpc"`
		ID      json.RawMessage `json:"id"`
		Error   detail          `json:"error"`
	}{"2.0", id, detail{code, text}}
}
