package tools

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// inputNeeded is returned by a call that must ask the client's user first. Its result carries the question.
type inputNeeded struct{ result *mcp.CallToolResult }

// Error implements error.
func (*inputNeeded) Error() string { return "the client's user is asked first" }

// protocolError is an error of the protocol, not of the tool.
type protocolError struct{ text string }

// Error implements error.
func (e *protocolError) Error() string { return e.text }

// ProtocolError makes the transport answer with a JSON-RPC error.
func (e *protocolError) ProtocolError() (code int, message string) { return mcp.INVALID_PARAMS, e.text }

// confirmTime is how long the user has to answer a question.
const confirmTime = 15 * time.Minute

// confirm asks the user of the client whether something that destroys work is meant, and returns nil if it is. If the client cannot ask,
// the error says to set the argument "confirm".
func (s *Toolbox) confirm(ctx context.Context, what, question string) error {
	client, ok := server.ClientSessionFromContext(ctx).(server.SessionWithClientInfo)
	if !ok || client.GetClientCapabilities().Elicitation == nil {
		return badArgument("%s Set \"confirm\" to true if that is meant.", question)
	}
	params := request(ctx)
	answer := server.ElicitationResponse(params.InputResponses, "confirm")
	if answer == nil {
		ask := server.NewInputRequestBuilder(s.sign(ctx, what, time.Now().Add(confirmTime)))
		ask.Elicit("confirm", mcp.ElicitationParams{Message: question + " Go on?", RequestedSchema: map[string]any{
			"type": "object", "required": []string{"confirm"},
			"properties": map[string]any{"confirm": map[string]any{"type": "boolean", "title": "Yes, go on", "default": false}},
		}})
		return &inputNeeded{ask.ToolResult()}
	}
	if !s.signed(ctx, what, params.RequestState) {
		return &protocolError{"the request state does not belong to this call, or is too old; call again without it"}
	}
	content, _ := answer.Content.(map[string]any)
	if yes, _ := content["confirm"].(bool); answer.Action != mcp.ElicitationResponseActionAccept || !yes {
		return badArgument("%s The user was asked and does not want that.", question)
	}
	return nil
}

// sign makes a request state. It is valid for one owner, one action and a limited time, and cannot be forged.
func (s *Toolbox) sign(ctx context.Context, what string, until time.Time) string {
	var expiry [8]byte
	binary.BigEndian.PutUint64(expiry[:], uint64(until.Unix()))
	return base64.RawURLEncoding.EncodeToString(append(expiry[:], s.mac(ctx, what, expiry)...))
}

func (s *Toolbox) mac(ctx context.Context, what string, expiry [8]byte) []byte {
	owner := ""
	if c, err := caller(ctx); err == nil {
		owner = c.Owner()
	}
	h := hmac.New(sha256.New, s.secret[:])
	h.Write(expiry[:])
	h.Write([]byte(owner + "\x00" + what))
	return h.Sum(nil)
}

func (s *Toolbox) signed(ctx context.Context, what, state string) bool {
	raw, err := base64.RawURLEncoding.Strict().DecodeString(state)
	if err != nil || len(raw) != 8+sha256.Size {
		return false
	}
	expiry := [8]byte(raw[:8])
	return hmac.Equal(raw[8:], s.mac(ctx, what, expiry)) && time.Now().Unix() < int64(binary.BigEndian.Uint64(expiry[:]))
}
