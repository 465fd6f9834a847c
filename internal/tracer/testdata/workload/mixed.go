package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// mixed does what its arguments say, one after the other: how:file:offset:length as ranges does, tree:dir, pages:number:each
// as pages does, and all else as files does.
func mixed(args []string) error {
	var number, each int
	for _, arg := range args {
		do := files
		if strings.Count(arg, ":") == 3 {
			do = ranges
		}
		if _, err := fmt.Sscanf(arg, "pages:%d:%d", &number, &each); err == nil {
			if err := pages(number, each); err != nil {
				return err
			}
			continue
		}
		if dir, ok := strings.CutPrefix(arg, "tree:"); ok {
			if err := tree(dir); err != nil {
				return err
			}
			continue
		}
		if err := do([]string{arg}); err != nil {
			return err
		}
	}
	return nil
}

// tree reads every regular file below a directory, in the order of their names.
func tree(dir string) error {
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		_, err = os.ReadFile(p)
		return err
	})
}
