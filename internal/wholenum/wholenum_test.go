package wholenum_test

import (
	"testing"

	"soulbox.dev/soulbox/internal/wholenum"
)

func TestUnmarshal(t *testing.T) {
	type inner struct {
		N int64 `json:"n"`
	}
	type outer struct {
		Text string           `json:"text"`
		P    *int             `json:"p"`
		F    float64          `json:"f"`
		List []int            `json:"list"`
		Map  map[string]int32 `json:"map"`
		In   inner            `json:"in"`
	}
	var got outer
	body := `{"text":"1.0 \"2.0","p":500.0,"f":0.5,"list":[1.0, 2e2 ,-3.0],"map":{"4.0":5.0},"in":{"n":9007199254740992.0}}`
	if err := wholenum.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	if got.Text != `1.0 "2.0` || *got.P != 500 || got.F != 0.5 || got.List[0] != 1 || got.List[1] != 200 || got.List[2] != -3 ||
		got.Map["4.0"] != 5 || got.In.N != 1<<53 {
		t.Errorf("%+v", got)
	}
	for _, bad := range []string{`{"p":500.5}`, `{"p":1e300}`, `{"p":"500.0"}`, `{"p":`, `{"p":1.0}}`, ``,
		`{"in":{"n":9007199254740993.0e3}}`} {
		if err := wholenum.Unmarshal([]byte(bad), &outer{}); err == nil {
			t.Errorf("%s: no error", bad)
		}
	}
}
