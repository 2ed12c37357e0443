package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Images returns the IDs of the templates that the sandboxes and snapshots of all servers need, including sandboxes on disk. If a state
// file cannot be read, that is an error, because what it needs is not known.
func (m *Manager) Images() (map[string]bool, error) {
	needed := map[string]bool{}
	for dir, file := range map[string]string{m.store.dir: "state.json", m.store.snapshots: "snapshot.json"} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			var of struct{ Image string }
			body, err := os.ReadFile(filepath.Join(dir, e.Name(), file))
			if err == nil {
				err = json.Unmarshal(body, &of)
			}
			switch {
			case err == nil:
				needed[of.Image] = true
			case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR):
				return nil, fmt.Errorf("read what %s needs: %w", e.Name(), err)
			}
		}
	}
	return needed, nil
}
