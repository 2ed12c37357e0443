package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/sandbox"
)

// checksumsName is the file of a checkpoint that has the checksums of the others. If it is missing, an older version made the checkpoint.
// If it is incomplete, the host lost its power during the save, or the file itself is damaged. Neither says anything about the other files,
// so in both cases they are used.
const checksumsName = "checksums.json"

// checksums are the checksums of a checkpoint's files. CRC-32C finds every change of up to three bits in a block of this size, every burst
// of up to 32 bits, and all but one in 4,000,000,000 of all other changes; the processor computes it as fast as it reads. It is no
// protection against someone who can write to the directory: nothing in the directory would be.
type checksums struct {
	Block int64                   `json:"block"` // bytes; the last of a file may be shorter
	Files map[string]fileChecksum `json:"files"`
}

type fileChecksum struct {
	Size   int64    `json:"size"`
	CRC32C []uint32 `json:"crc32c"` // of each block
}

// sealed holds checksums with a checksum of their own.
type sealed struct {
	Checksums json.RawMessage `json:"checksums"`
	CRC32C    uint32          `json:"crc32c"`
}

const (
	checksumBlock = 1 << 20
	// checksumAtOnce is how many blocks are summed at the same time.
	checksumAtOnce = 2
)

// sumBlocks returns the checksum of each block of a file with the given size.
func sumBlocks(ctx context.Context, f io.ReaderAt, size, block int64) ([]uint32, error) {
	sums := make([]uint32, (size+block-1)/block)
	table := crc32.MakeTable(crc32.Castagnoli)
	var next atomic.Int64
	var all sync.WaitGroup
	errs := make([]error, checksumAtOnce)
	for i := range errs {
		all.Go(func() {
			buf := make([]byte, min(block, size))
			for n := next.Add(1) - 1; n < int64(len(sums)) && errs[i] == nil; n = next.Add(1) - 1 {
				part := buf[:min(block, size-n*block)]
				if _, errs[i] = f.ReadAt(part, n*block); errors.Is(errs[i], io.EOF) {
					errs[i] = nil // the file ends with what was read
				}
				sums[n] = crc32.Checksum(part, table)
				if errs[i] == nil {
					errs[i] = context.Cause(ctx)
				}
			}
		})
	}
	all.Wait()
	return sums, errors.Join(errs...)
}

// seal writes the checksums of a checkpoint's files beside them.
func (r *Runtime) seal(ctx context.Context, dir string, files []*os.File) error {
	sums := checksums{Block: checksumBlock, Files: map[string]fileChecksum{}}
	for _, f := range files {
		info, err := f.Stat()
		if err != nil {
			return err
		}
		sum := fileChecksum{Size: info.Size()}
		if sum.CRC32C, err = sumBlocks(ctx, f, sum.Size, checksumBlock); err != nil {
			return err
		}
		sums.Files[filepath.Base(f.Name())] = sum
	}
	body, err := json.Marshal(sums)
	if err != nil {
		return err
	}
	if body, err = json.Marshal(sealed{Checksums: body, CRC32C: crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))}); err != nil {
		return err
	}
	return durable.Create(filepath.Join(dir, checksumsName), body, 0o600)
}

// verify compares a checkpoint's files with their checksums. A difference is sandbox.ErrDamaged; other errors mean that it is not known.
func (r *Runtime) verify(ctx context.Context, dir string) error {
	body, err := r.readFile("read checksums", filepath.Join(dir, checksumsName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read checksums: %w", err)
	}
	var seal sealed
	var sums checksums
	if json.Unmarshal(body, &seal) != nil || crc32.Checksum(seal.Checksums, crc32.MakeTable(crc32.Castagnoli)) != seal.CRC32C ||
		json.Unmarshal(seal.Checksums, &sums) != nil || sums.Block <= 0 || sums.Block > 64<<20 {
		r.log().Warn("the checksums of a checkpoint are incomplete; it is used unverified", "dir", dir)
		return nil
	}
	for name, want := range sums.Files {
		if err := r.verifyFile(ctx, filepath.Join(dir, filepath.Base(name)), want, sums.Block); err != nil {
			return err
		}
	}
	return nil
}

func (r *Runtime) verifyFile(ctx context.Context, name string, want fileChecksum, block int64) error {
	var f *os.File
	err := r.ask("open checkpoint", func() (err error) {
		f, err = os.Open(name)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: its file %s is missing", sandbox.ErrDamaged, filepath.Base(name))
	}
	if err != nil {
		return fmt.Errorf("verify checkpoint: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && info.Size() != want.Size {
		return fmt.Errorf("%w: its file %s has %d bytes of %d", sandbox.ErrDamaged, filepath.Base(name), info.Size(), want.Size)
	}
	var sums []uint32
	if err == nil {
		sums, err = sumBlocks(ctx, f, want.Size, block)
	}
	if err != nil {
		return fmt.Errorf("verify checkpoint: %w", err)
	}
	for i, sum := range sums {
		if i >= len(want.CRC32C) || sum != want.CRC32C[i] {
			return fmt.Errorf("%w: its file %s is not as it was saved, in the %d bytes from %d on", sandbox.ErrDamaged, filepath.Base(name),
				min(block, want.Size-int64(i)*block), int64(i)*block)
		}
	}
	return nil
}
