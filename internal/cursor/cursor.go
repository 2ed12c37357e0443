// Package cursor makes the texts by which a client continues a list or a log where an earlier call stopped, and reads them back. Clients
// give them back unread. Any other text, or a cursor of another list, is refused. A cursor is no proof: it names a place, and who may read
// there is asked again. What clients may compute themselves is not one, such as an offset in an output, or the cursors of E2B's logs, which
// are times.
package cursor

import (
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ErrInvalid says that a text is not a cursor of the list that was asked for.
var ErrInvalid = errors.New("the cursor does not come from here; leave it out to start again")

// maxText bounds a cursor, in bytes.
const maxText = 1 << 10

// Encode makes a cursor: a place in a list. A place has strings and numbers (int64, from 0 on); only its last one may contain spaces. It
// refuses a place that is too long for a cursor, since Decode would.
func Encode(list string, place ...any) (string, error) {
	var text strings.Builder
	text.WriteString(list)
	for _, part := range place {
		fmt.Fprintf(&text, " %v", part)
	}
	if n := base64.RawURLEncoding.EncodedLen(text.Len()); n > maxText {
		return "", fmt.Errorf("a cursor of the list %s would have %d bytes, at most %d are possible", list, n, maxText)
	}
	return base64.RawURLEncoding.EncodeToString([]byte(text.String())), nil
}

// Decode reads the place of a cursor that Encode made for the same list into place, which has pointers to strings and to int64.
func Decode(list, text string, place ...any) error {
	if len(text) > maxText {
		return ErrInvalid
	}
	body, err := base64.RawURLEncoding.DecodeString(text)
	parts := strings.SplitN(string(body), " ", 1+len(place))
	if err != nil || len(parts) != 1+len(place) || parts[0] != list ||
		base64.RawURLEncoding.EncodeToString(body) != text { // a decoder passes over line breaks
		return ErrInvalid
	}
	for i, to := range place {
		switch part := parts[1+i]; to := to.(type) {
		case *string:
			*to = part
		case *int64:
			if *to, err = strconv.ParseInt(part, 10, 64); err != nil || *to < 0 {
				return ErrInvalid
			}
		default:
			panic(fmt.Sprintf("cursor: %T in a place", to)) // a fault of the caller, which every call shows
		}
	}
	return nil
}

// Key is the sort key of an entry in a list by time, and among those of the same time by name.
func Key(at time.Time, name string) string { return fmt.Sprintf("%019d.%s", at.UnixNano(), name) }

// Page sorts a list by keys, which differ, and cuts it to a page of at most limit entries. It begins behind the page that ended with the
// cursor after ("": at the start), so entries made or ended meanwhile neither repeat nor hide others. next is the cursor of the page
// that follows; "" if there is none.
func Page[T any](list, after string, all []T, limit int, falling bool, key func(T) string) (page []T, next string, err error) {
	type entry struct {
		key string
		one T
	}
	order := func(a, b string) int {
		if falling {
			a, b = b, a
		}
		return strings.Compare(a, b)
	}
	last := ""
	if after != "" {
		if err := Decode(list, after, &last); err != nil {
			return nil, "", err
		}
	}
	var rest []entry
	for _, one := range all {
		if e := (entry{key(one), one}); after == "" || order(e.key, last) > 0 {
			rest = append(rest, e)
		}
	}
	slices.SortFunc(rest, func(a, b entry) int { return order(a.key, b.key) })
	page = make([]T, min(limit, len(rest)))
	for i := range page {
		page[i] = rest[i].one
	}
	if limit < len(rest) {
		next, err = Encode(list, rest[limit-1].key)
	}
	return page, next, err
}
