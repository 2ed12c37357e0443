package guest

import (
	"strings"
)

// encodedSize returns how many bytes the texts take in JSON at most: encoding/json writes some bytes as six.
func encodedSize(texts ...string) int {
	n := 0
	for _, text := range texts {
		n += len(text)
		for i := range len(text) {
			if c := text[i]; c < 0x20 || c >= 0x7f || strings.IndexByte(`<>&"\\`, c) >= 0 {
				n += 5
			}
		}
	}
	return n
}
