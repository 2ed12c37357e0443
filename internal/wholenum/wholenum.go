// Package wholenum reads whole numbers that JSON writes as fractions. To JSON Schema, 500.0 and 5e2 are integers (draft 2020-12, 6.1.1),
// and the SDKs of some models and Python's json write them so, but encoding/json refuses them for Go's integers.
package wholenum

import (
	"bytes"
	"encoding/json"
	"io"
	"math"
	"strconv"
)

// exact is the bound up to which a float64 holds every integer exactly.
const exact = 1 << 53

// Unmarshal is json.Unmarshal that accepts whole numbers for integers however they are written. It changes nothing else, and no strings.
func Unmarshal(body []byte, to any) error {
	err := json.Unmarshal(body, to)
	if err == nil {
		return nil
	}
	if plain := rewrite(body); plain != nil {
		return json.Unmarshal(plain, to)
	}
	return err
}

// rewrite writes whole numbers without fraction or exponent; it returns nil if the body has none to rewrite or is not JSON.
func rewrite(body []byte) []byte {
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	var out bytes.Buffer
	from, changed := 0, false
	for {
		token, err := d.Token()
		if err == io.EOF && changed {
			out.Write(body[from:])
			return out.Bytes()
		}
		if err != nil {
			return nil
		}
		text, ok := token.(json.Number)
		if !ok {
			continue
		}
		if value, err := text.Float64(); err == nil && value == math.Trunc(value) && math.Abs(value) <= exact {
			end := int(d.InputOffset())
			out.Write(body[from : end-len(text)])
			out.WriteString(strconv.FormatInt(int64(value), 10))
			from, changed = end, true
		}
	}
}
