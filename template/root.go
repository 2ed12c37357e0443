package template

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
)

// rootTree is the root of the host template in memory, by path. Its digest is known before anything is written, and what is written is what
// was digested, even if the machine's files change meanwhile.
type rootTree struct {
	entries map[string]rootEntry
	size    int // of all texts, in bytes
}

// rootEntry is a directory, a link or a file.
type rootEntry struct {
	mode fs.FileMode
	link string
	text []byte
}

func newRootTree() *rootTree { return &rootTree{entries: map[string]rootEntry{}} }

func (t *rootTree) has(name string) bool {
	_, there := t.entries[name]
	return there
}

func (t *rootTree) dir(name string, mode fs.FileMode) {
	t.entries[name] = rootEntry{mode: fs.ModeDir | mode}
}

func (t *rootTree) link(name, target string) {
	t.parents(name)
	t.entries[name] = rootEntry{mode: fs.ModeSymlink, link: target}
}

func (t *rootTree) file(name string, mode fs.FileMode, text []byte) {
	t.parents(name)
	t.size += len(text) - len(t.entries[name].text)
	t.entries[name] = rootEntry{mode: mode, text: text}
}

// parents adds the directories above a name.
func (t *rootTree) parents(name string) {
	for dir := path.Dir(name); dir != "." && !t.has(dir); dir = path.Dir(dir) {
		t.dir(dir, 0o755)
	}
}

// digest hashes names, modes and contents.
func (t *rootTree) digest() string {
	sum := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(t.entries)) {
		e := t.entries[name]
		fmt.Fprintf(sum, "%q %v %q %d ", name, e.mode, e.link, len(e.text))
		sum.Write(e.text)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// write makes the tree in an empty directory.
func (t *rootTree) write(root string) error {
	for _, name := range slices.Sorted(maps.Keys(t.entries)) { // a directory comes before its content
		e, to := t.entries[name], filepath.Join(root, name)
		var err error
		switch {
		case e.mode.IsDir():
			if err = os.Mkdir(to, 0o755); err == nil {
				err = os.Chmod(to, e.mode.Perm()|e.mode&fs.ModeSticky)
			}
		case e.mode&fs.ModeSymlink != 0:
			err = os.Symlink(e.link, to)
		default:
			err = os.WriteFile(to, e.text, e.mode.Perm()|0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
