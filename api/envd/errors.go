package envd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"syscall"

	"connectrpc.com/connect"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
)

// codes maps errors to the codes that clients know, for Connect and for plain HTTP; the first match counts.
var codes = []struct {
	err  error
	code connect.Code
	http int
}{
	{agent.ErrNoUser, connect.CodeUnauthenticated, http.StatusUnauthorized},
	{agent.ErrNoProcess, connect.CodeNotFound, http.StatusNotFound},
	{agent.ErrNoWatch, connect.CodeNotFound, http.StatusNotFound},
	{fs.ErrNotExist, connect.CodeNotFound, http.StatusNotFound},
	{agent.ErrTagInUse, connect.CodeAlreadyExists, http.StatusConflict},
	{syscall.ENOTEMPTY, connect.CodeFailedPrecondition, http.StatusBadRequest},
	{fs.ErrExist, connect.CodeAlreadyExists, http.StatusConflict},
	{syscall.ENOSPC, connect.CodeResourceExhausted, http.StatusInsufficientStorage},
	{syscall.EDQUOT, connect.CodeResourceExhausted, http.StatusInsufficientStorage},
	{agent.ErrLimit, connect.CodeResourceExhausted, http.StatusTooManyRequests},
	{agent.ErrWatches, connect.CodeResourceExhausted, http.StatusTooManyRequests},
	{sandbox.ErrNoRoom, connect.CodeResourceExhausted, http.StatusTooManyRequests},
	{sandbox.ErrTooMany, connect.CodeResourceExhausted, http.StatusTooManyRequests},
	{agent.ErrEnded, connect.CodeNotFound, http.StatusNotFound},
	{agent.ErrStdin, connect.CodeFailedPrecondition, http.StatusBadRequest},
	{agent.ErrNoTerminal, connect.CodeFailedPrecondition, http.StatusBadRequest},
	{agent.ErrVersion, connect.CodeUnimplemented, http.StatusNotImplemented},
	{agent.ErrCwd, connect.CodeInvalidArgument, http.StatusBadRequest},
	{agent.ErrInvalid, connect.CodeInvalidArgument, http.StatusBadRequest},
	{agent.ErrCommand, connect.CodeInvalidArgument, http.StatusBadRequest},
	{agent.ErrTooLarge, connect.CodeInvalidArgument, http.StatusBadRequest},
	{agent.ErrNotRegular, connect.CodeInvalidArgument, http.StatusBadRequest},
	{agent.ErrNoSignal, connect.CodeInvalidArgument, http.StatusBadRequest},
	{sandbox.ErrInvalid, connect.CodeInvalidArgument, http.StatusBadRequest},
	{syscall.EINVAL, connect.CodeInvalidArgument, http.StatusBadRequest},
	{syscall.ENOTDIR, connect.CodeInvalidArgument, http.StatusBadRequest},
	{syscall.EISDIR, connect.CodeInvalidArgument, http.StatusBadRequest},
	{syscall.ENAMETOOLONG, connect.CodeInvalidArgument, http.StatusBadRequest},
	{syscall.ELOOP, connect.CodeInvalidArgument, http.StatusBadRequest},
	{fs.ErrPermission, connect.CodePermissionDenied, http.StatusForbidden},
	{syscall.EROFS, connect.CodePermissionDenied, http.StatusForbidden},
	{context.DeadlineExceeded, connect.CodeDeadlineExceeded, http.StatusGatewayTimeout},
	{context.Canceled, connect.CodeCanceled, 499},
	{sandbox.ErrClosed, connect.CodeUnavailable, http.StatusBadGateway},
	{sandbox.ErrState, connect.CodeUnavailable, http.StatusBadGateway},
	{agent.ErrLost, connect.CodeUnavailable, http.StatusBadGateway},
}

// rpcError gives an error its Connect code.
func rpcError(err error) error {
	var known *connect.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return connect.NewError(c.code, err)
		}
	}
	return connect.NewError(connect.CodeInternal, err)
}

// refuse answers with an error. If the sandbox has ended or the client is gone, it breaks off the connection.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if p, ok := r.Context().Value(scopeKey{}).(*scope); ok && p.hasEnded(err) || r.Context().Err() != nil {
		panic(http.ErrAbortHandler)
	}
	code := http.StatusInternalServerError
	for _, c := range codes {
		if errors.Is(err, c.err) {
			code = c.http
			break
		}
	}
	if code == http.StatusInternalServerError {
		s.log.Warn("envd", "path", r.URL.Path, "error", err)
	}
	fail(w, code, err.Error())
}

// refusals maps the statuses of plain HTTP to Connect's codes.
var refusals = map[int]connect.Code{400: connect.CodeInvalidArgument, 401: connect.CodeUnauthenticated, 403: connect.CodePermissionDenied,
	404: connect.CodeNotFound, 409: connect.CodeFailedPrecondition,
	429: connect.CodeResourceExhausted, 501: connect.CodeUnimplemented, 503: connect.CodeUnavailable, 504: connect.CodeDeadlineExceeded}

// Refuse answers a Connect call with an error in Connect's form, given its HTTP status. It returns false, and does nothing, if the request
// is no Connect call.
func Refuse(w http.ResponseWriter, r *http.Request, status int, message string) bool {
	told := connect.NewErrorWriter()
	if !told.IsSupported(r) {
		return false
	}
	_ = told.Write(w, r, connect.NewError(cmp.Or(refusals[status], connect.CodeInternal),
		errors.New(message))) // the client may be gone
	return true
}

// errorf makes an error with a code.
func errorf(code connect.Code, format string, args ...any) *connect.Error {
	return connect.NewError(code, fmt.Errorf(format, args...))
}
