package sandbox_test

import (
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestMain checks that no goroutine outlives the tests.
func TestMain(m *testing.M) { sandboxtest.NoLeaks(m) }
