package report_test

import (
	"context"
	"image"
	"image/color"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/report"
	"github.com/headstart-oci/headstart/internal/testenv"
)

// A real browser draws the page, light and dark, on a desk and on a phone: its background, its
// charts, and nothing beyond the right edge.
func TestBrowser(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a browser four times")
	}
	chromium := testenv.Tool(t, "chromium")
	file := filepath.Join(t.TempDir(), "page.html")
	page := write(t, profileOf(t, bigList(2000)), report.Options{PolicyName: "any run", Image: sampleImage()})
	if err := os.WriteFile(file, []byte(page), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		width            string
		dark             bool
		back, low, upper color.RGBA
	}{
		"desk":        {"1200", false, rgb(0xfbfaf7), rgb(0x1f5fa8), rgb(0xa9c7e8)},
		"desk, dark":  {"1200", true, rgb(0x14171b), rgb(0x6db0f5), rgb(0x2c4f78)},
		"phone":       {"390", false, rgb(0xfbfaf7), rgb(0x1f5fa8), rgb(0xa9c7e8)},
		"phone, dark": {"390", true, rgb(0x14171b), rgb(0x6db0f5), rgb(0x2c4f78)},
	} {
		t.Run(name, func(t *testing.T) {
			shot := screenshot(t, chromium, file, c.width, c.dark)
			at := func(x, y int) color.RGBA { return color.RGBAModel.Convert(shot.At(x, y)).(color.RGBA) }
			size := shot.Bounds().Size()
			count := map[color.RGBA]int{}
			for y := range size.Y {
				for x := range size.X {
					count[at(x, y)]++
				}
				if got := at(size.X-1, y); got != c.back {
					t.Fatalf("line %d: the last column is %v, want the background %v: the page is too wide", y, got, c.back)
				}
			}
			if at(0, 0) != c.back || count[c.low] < 1000 || count[c.upper] < 1000 || len(count) < 50 {
				t.Errorf("corner %v, %d points of the lower and %d of the upper curve, %d colours", at(0, 0), count[c.low], count[c.upper], len(count))
			}
		})
	}
}

func rgb(v uint32) color.RGBA {
	return color.RGBA{uint8(v >> 16), uint8(v >> 8), uint8(v), 0xff}
}

func screenshot(t *testing.T, chromium, file, width string, dark bool) image.Image {
	t.Helper()
	dir := t.TempDir()
	out := filepath.Join(dir, "shot.png")
	args := []string{
		"--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage",
		"--disable-background-networking", "--disable-sync", "--no-zygote", "--user-data-dir=" + filepath.Join(dir, "profile"),
		"--window-size=" + width + ",1600", "--screenshot=" + out,
	}
	if os.Geteuid() == 0 {
		args = append(args, "--no-sandbox") // it refuses to run as root with one
	}
	if dark {
		args = append(args, "--blink-settings=preferredColorScheme=0")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, chromium, append(args, "file://"+file)...)
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_RUNTIME_DIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v:\n%s", err, log.String())
	}
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // helpers that outlive it
	f, err := os.Open(out)
	if err != nil {
		t.Fatalf("%v:\n%s", err, log.String())
	}
	defer f.Close()
	img, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	return img
}
