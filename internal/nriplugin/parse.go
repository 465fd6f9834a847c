package nriplugin

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// maxConfig bounds the text of a configuration in bytes; the sample is 6 KiB.
const maxConfig = 1 << 20

// text is a value whose meaning is worked out after decoding, so that errors can name its key.
type text string

// UnmarshalText implements encoding.TextUnmarshaler; go-toml hands integers over as their digits.
func (t *text) UnmarshalText(b []byte) error {
	*t = text(b)
	return nil
}

// document is the file as it is written; [Config] is what it means.
type document struct {
	Config
	Timeout       *text `toml:"timeout"`
	StartDeadline *text `toml:"start_deadline"`
	IdleTimeout   *text `toml:"idle_timeout"`
	Override      []struct {
		Images      []string `toml:"images"`
		ReadyLog    *string  `toml:"ready_log"`
		Timeout     *text    `toml:"timeout"`
		IdleTimeout *text    `toml:"idle_timeout"`
	} `toml:"override"`
	Rebuild struct {
		RebuildConfig
		Timeout *text `toml:"timeout"`
	} `toml:"rebuild"`
}

// ParseConfig returns base with the keys that data sets. Data is TOML of at most 1 MiB, upstream's
// file or ours. An unknown key, a wrong type and a bad value are errors that match
// [ErrConfig] and name the key and, where known, the line. The result has passed [Config.Validate].
func ParseConfig(data []byte, base Config) (Config, error) {
	if len(data) > maxConfig {
		return Config{}, fmt.Errorf("%w: got %d bytes, want at most %d", ErrConfig, len(data), maxConfig)
	}
	var doc document
	doc.Config = base
	doc.Rebuild.RebuildConfig = base.Rebuild
	dec := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := dec.Decode(&doc); err != nil {
		return Config{}, describe(err)
	}
	c := doc.Config
	c.Rebuild = doc.Rebuild.RebuildConfig
	for _, d := range []struct {
		key   string
		from  *text
		to    *time.Duration
		parse func(string) (time.Duration, error)
	}{
		{"timeout", doc.Timeout, &c.Timeout, ParseTimeout},
		{"start_deadline", doc.StartDeadline, &c.StartDeadline, parseDuration},
		{"idle_timeout", doc.IdleTimeout, &c.IdleTimeout, parseDuration},
		{"rebuild.timeout", doc.Rebuild.Timeout, &c.Rebuild.Timeout, ParseTimeout},
	} {
		if d.from == nil {
			continue
		}
		v, err := d.parse(string(*d.from))
		if err != nil {
			return Config{}, &keyError{key: d.key, line: lineOf(data, d.key), text: err.Error()}
		}
		*d.to = v
	}
	if err := doc.overrides(&c); err != nil {
		return Config{}, err
	}
	faults := c.faults()
	for _, f := range faults {
		f.line = lineOf(data, f.key)
	}
	if err := join(faults); err != nil {
		return Config{}, err
	}
	return c, nil
}

// overrides works out what the [[override]] tables say.
func (doc *document) overrides(c *Config) error {
	if len(doc.Override) > 0 {
		c.Overrides = nil // those of base are replaced, as every key is
	}
	for i, from := range doc.Override {
		to := Override{Images: from.Images, ReadyLog: from.ReadyLog}
		for _, d := range []struct {
			key   string
			from  *text
			to    **time.Duration
			parse func(string) (time.Duration, error)
		}{
			{"timeout", from.Timeout, &to.Timeout, ParseTimeout},
			{"idle_timeout", from.IdleTimeout, &to.IdleTimeout, parseDuration},
		} {
			if d.from == nil {
				continue
			}
			v, err := d.parse(string(*d.from))
			if err != nil {
				return &keyError{key: fmt.Sprintf("override[%d].%s", i, d.key), text: err.Error()}
			}
			*d.to = &v
		}
		c.Overrides = append(c.Overrides, to)
	}
	return nil
}

// keyError is a value that cannot be used.
type keyError struct {
	key  string
	line int // 0: not known
	text string
}

func (e *keyError) Error() string {
	if e.line > 0 {
		return fmt.Sprintf("%v: line %d: key %s: %s", ErrConfig, e.line, e.key, e.text)
	}
	return fmt.Sprintf("%v: key %s: %s", ErrConfig, e.key, e.text)
}

func (e *keyError) Unwrap() error { return ErrConfig }

func join(faults []*keyError) error {
	errs := make([]error, len(faults))
	for i, f := range faults {
		errs[i] = f
	}
	return errors.Join(errs...)
}

// describe turns go-toml's errors into ours: every unknown key with its line, no Go types.
func describe(err error) error {
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		var errs []error
		for i := range strict.Errors {
			e := &strict.Errors[i]
			row, _ := e.Position()
			errs = append(errs, fmt.Errorf("%w: line %d: unknown key %s", ErrConfig, row, strings.Join(e.Key(), ".")))
		}
		return errors.Join(errs...)
	}
	if de, ok := errors.AsType[*toml.DecodeError](err); ok {
		row, _ := de.Position()
		msg := strings.TrimPrefix(de.Error(), "toml: ")
		if m := wrongType.FindStringSubmatch(msg); m != nil {
			msg = fmt.Sprintf("got a TOML %s, want %s", m[1], goType(m[2]))
		}
		if k := de.Key(); len(k) > 0 {
			return fmt.Errorf("%w: line %d: key %s: %s", ErrConfig, row, strings.Join(k, "."), msg)
		}
		return fmt.Errorf("%w: line %d: %s", ErrConfig, row, msg)
	}
	return fmt.Errorf("%w: %w", ErrConfig, err)
}

var wrongType = regexp.MustCompile(`^cannot decode TOML (\S+) into (?:struct field \S+ of type|a Go value of type) (.*)$`)

func goType(t string) string {
	switch {
	case strings.HasPrefix(t, "[]"):
		return "an array of strings"
	case strings.HasPrefix(t, "struct"):
		return "a table"
	case strings.HasPrefix(t, "int"):
		return "an integer"
	case t == "bool":
		return "true or false"
	case t == "string":
		return "a string"
	default:
		return "a duration such as \"30s\""
	}
}

// lineOf returns the line of the dotted key, from 1, or 0 when it cannot be told.
func lineOf(data []byte, key string) int {
	var p unstable.Parser
	p.Reset(data)
	table := ""
	for p.NextExpression() {
		e := p.Expression()
		var parts []string
		var at unstable.Range
		for it := e.Key(); it.Next(); {
			parts = append(parts, string(it.Node().Data))
			at = it.Node().Raw
		}
		name := strings.Join(parts, ".")
		switch e.Kind {
		case unstable.Table:
			table = name + "."
		case unstable.KeyValue:
			if table+name == key {
				return p.Shape(at).Start.Line
			}
		default:
		}
	}
	return 0
}
