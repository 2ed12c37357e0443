package sandbox

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/durable"
)

// Level is the severity of a log entry.
type Level string

// The levels, and the sources of entries.
const (
	LevelDebug Level = "debug"
	LevelInfo  Level = "info"
	LevelWarn  Level = "warn"
	LevelError Level = "error"

	SourceSystem  = "system"  // about the sandbox itself
	SourceProcess = "process" // starts and ends of processes
	SourceBuild   = "build"
)

// Levels lists all levels, the least severe first.
func Levels() []Level { return []Level{LevelDebug, LevelInfo, LevelWarn, LevelError} }

const (
	logName     = "log.jsonl"
	olderSuffix = ".1"
	maxLogFile  = 1 << 20  // bytes; one older file of that size is kept beside it
	maxLogLine  = 64 << 10 // bytes
	maxMessage  = 4000     // bytes of an entry
)

// LogEntry is something that happened to a sandbox.
type LogEntry struct {
	Seq     int64     `json:"seq"`
	Time    time.Time `json:"time"`
	Level   Level     `json:"level"`
	Source  string    `json:"source"`
	Message string    `json:"message"`
}

// journal is the log of a sandbox, a file of JSON lines of bounded size: when it is full, it replaces the older file, and a new one begins.
// It also tells those who wait that the sandbox has changed. It is safe for concurrent use.
type journal struct {
	store store
	id    string
	log   *slog.Logger // for the operator

	mu      sync.Mutex
	seq     int64         // of the last entry
	size    int64         // of the file
	know    bool          // seq and size are known
	changed chan struct{} // closed at the next change; nil if nobody waits
}

// append adds an entry to the log in dir.
func (j *journal) append(d durable.Disk, dir string, e LogEntry) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	name := filepath.Join(dir, logName)
	if err := j.open(dir); err != nil {
		return err
	}
	if j.size >= maxLogFile {
		if err := d.Rename(name, name+olderSuffix); err != nil {
			return err
		}
		j.size = 0
	}
	if e.Message = agent.Inert([]byte(e.Message)); len(e.Message) > maxMessage {
		e.Message = string(agent.Whole([]byte(e.Message[:maxMessage]))) + "…"
	}
	e.Seq = j.seq + 1
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if err := d.Append(name, line); err != nil {
		j.know = false // half a line may be there
		return err
	}
	j.seq, j.size = e.Seq, j.size+int64(len(line))+1
	return nil
}

// open finds the size and the last entry of the file. j.mu is held.
func (j *journal) open(dir string) error {
	if j.know {
		return nil
	}
	j.size = 0
	for _, name := range []string{logName + olderSuffix, logName} {
		info, err := os.Stat(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		j.size = info.Size()
		err = eachLine(filepath.Join(dir, name), func(line []byte) error {
			var e LogEntry
			if json.Unmarshal(line, &e) == nil {
				j.seq = max(j.seq, e.Seq)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if !isThere(filepath.Join(dir, logName)) {
		j.size = 0
	}
	j.know = true
	return nil
}

// eachLine reads a file line by line. A line longer than maxLogLine, which SoulBox never writes, is an error.
func eachLine(name string, each func([]byte) error) error {
	f, err := os.Open(name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, maxLogLine)
	for {
		line, err := r.ReadSlice('\n')
		if err == nil {
			if err := each(bytes.TrimSuffix(line, []byte("\n"))); err != nil {
				return err
			}
			continue
		}
		if errors.Is(err, io.EOF) {
			if len(line) > 0 { // it was cut off, but may be complete without its newline
				return each(line)
			}
			return nil
		}
		return fmt.Errorf("read %s: %w", filepath.Base(name), err)
	}
}

// note adds to the log what happened to the sandbox.
func (j *journal) note(level Level, format string, args ...any) {
	j.add(LogEntry{Time: time.Now(), Level: level, Source: SourceSystem, Message: fmt.Sprintf(format, args...)})
}

// noteEvents adds what happened to processes.
func (j *journal) noteEvents(events []agent.Event) {
	var entries []LogEntry
	for _, ev := range events {
		e := LogEntry{Time: ev.Time, Level: LevelInfo, Source: SourceProcess, Message: describeEvent(ev)}
		if ev.Cause != "" {
			e.Level = LevelWarn
		}
		entries = append(entries, e)
	}
	j.add(entries...)
}

// add adds entries to the log, and announces that there are some.
func (j *journal) add(entries ...LogEntry) {
	for _, e := range entries {
		if err := j.append(j.store.Disk, j.store.path(j.id), e); err != nil {
			j.log.Error("write the log of a sandbox", "sandbox", j.id, "error", err, "entry", e.Message)
		}
	}
	if len(entries) > 0 {
		j.announce()
	}
}

// announce tells those who wait that the sandbox has changed.
func (j *journal) announce() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.changed != nil {
		close(j.changed)
		j.changed = nil
	}
}

// nextChange returns a channel that is closed at the next change.
func (j *journal) nextChange() <-chan struct{} {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.changed == nil {
		j.changed = make(chan struct{})
	}
	return j.changed
}

func describeEvent(ev agent.Event) string {
	text := plain(ev.Process)
	if ev.Tag != "" {
		text += " (" + plain(ev.Tag) + ")"
	}
	if ev.Kind == agent.EventStarted {
		return fmt.Sprintf("process %s started as %s", text, plain(ev.User))
	}
	if ev.Kind == agent.EventKilled {
		return fmt.Sprintf("out of memory: %s killed, of process %s, with %d MB: the sandbox had reached its limit of %d MB",
			quantity(ev.Killed, plain(ev.Name)), text, ev.Memory>>20, ev.Limit>>20)
	}
	text = fmt.Sprintf("process %s ended after %s with exit code %d", text, time.Duration(ev.TookMS)*time.Millisecond, ev.ExitCode)
	if ev.Signal != "" {
		text += " by " + plain(ev.Signal)
	}
	switch ev.Cause {
	case "":
	case agent.CauseOOM:
		text += ": the sandbox had reached its memory limit"
	default:
		text += ": " + plain(ev.Cause)
	}
	return text
}

// quantity names programs: "python3 was", "68 processes (python3 and others) were".
func quantity(n int, name string) string {
	if n == 1 {
		return name + " was"
	}
	return fmt.Sprintf("%d processes (%s and others) were", n, name)
}

// plain makes a word from the guest harmless and keeps it on one line.
func plain(word string) string {
	return strings.ReplaceAll(agent.Inert(agent.Whole([]byte(word[:min(len(word), 200)]))), "\n", `\x0a`)
}

// LogQuery selects log entries; zero values select all.
type LogQuery struct {
	Since, Until time.Time
	Level        Level  // at least this severe
	Source       string // one of the sources
	Text         string // contained in the message
	After        int64  // the Seq of the last entry that the caller knows
	Limit        int    // at most that many: the first after After; without After the last, unless First is set; default 100
	First        bool
}

const maxLogLimit = 1000

// LogPage is the result of a query, the oldest entry first.
type LogPage struct {
	Entries []LogEntry
	More    bool  // the limit left out some
	Last    int64 // the After for later entries
}

// page returns entries of the log.
func (j *journal) page(q LogQuery) (LogPage, error) {
	page := LogPage{Entries: []LogEntry{}, Last: q.After}
	if q.Limit <= 0 || q.Limit > maxLogLimit {
		q.Limit = 100
	}
	least := slices.Index(Levels(), q.Level)
	err := j.store.eachLine(j.id, logName, func(line []byte) error {
		var e LogEntry
		if json.Unmarshal(line, &e) != nil {
			return nil // it was cut off
		}
		page.Last = max(page.Last, e.Seq)
		if e.Seq <= q.After || !q.Since.IsZero() && e.Time.Before(q.Since) || !q.Until.IsZero() && !e.Time.Before(q.Until) ||
			slices.Index(Levels(), e.Level) < least || q.Source != "" && e.Source != q.Source || !strings.Contains(e.Message, q.Text) {
			return nil
		}
		page.Entries = append(page.Entries, e)
		return nil
	})
	if err != nil {
		return LogPage{}, err
	}
	if page.More = len(page.Entries) > q.Limit; page.More && (q.After > 0 || q.First) {
		page.Entries = page.Entries[:q.Limit]
		page.Last = page.Entries[q.Limit-1].Seq
	} else if page.More {
		page.Entries = page.Entries[len(page.Entries)-q.Limit:]
	}
	return page, nil
}

// Logs returns log entries of the sandbox.
func (s *Sandbox) Logs(q LogQuery) (LogPage, error) { return s.log.page(q) }

// Changed is closed at the next change of what Info or Logs tell.
func (s *Sandbox) Changed() <-chan struct{} { return s.log.nextChange() }

// logChange adds to the log, and announces a change of the sandbox. s.mu is held.
func (s *Sandbox) logChange(format string, args ...any) {
	s.log.note(LevelInfo, format, args...)
	if s.m.opts.Changed != nil {
		s.m.opts.Changed(s.info())
	}
}
