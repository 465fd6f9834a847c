package linksim_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/linksim"
	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// start returns a link of the profile to a server of the handler, and a client with connections of its own.
func start(t *testing.T, p linksim.Profile, h http.Handler) (*linksim.Link, *http.Client) {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	link, err := linksim.Start(strings.TrimPrefix(server.URL, "http://"), p)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		if err := errors.Join(link.Close(), link.Close()); err != nil {
			t.Error(err)
		}
	})
	return link, &http.Client{Transport: transport}
}

// payload answers with as many bytes as the path says, the same each time.
func payload(w http.ResponseWriter, r *http.Request) {
	var n int
	if _, err := fmt.Sscanf(r.URL.Path, "/%d", &n); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	_, _ = w.Write(content(n))
}

func content(n int) []byte {
	b := make([]byte, n)
	src := rand.NewChaCha8([32]byte{1})
	_, _ = src.Read(b)
	return b
}

func get(client *http.Client, url string) ([]byte, error) {
	resp, err := client.Get(url)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}

func TestBytesStayTheSame(t *testing.T) {
	const size = 3<<20 + 7
	for _, p := range []linksim.Profile{{}, {RTT: time.Millisecond, BitsPerSecond: 1e9}, {BitsPerSecond: 400e6}, {RTT: 3 * time.Millisecond}} {
		t.Run(p.String(), func(t *testing.T) {
			link, client := start(t, p, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				h := sha256.New()
				_, _ = io.Copy(h, r.Body)
				w.Header().Set("Sum", fmt.Sprintf("%x", h.Sum(nil)))
				payload(w, r)
			}))
			sent := content(size / 2)
			var all sync.WaitGroup
			for range 4 {
				all.Go(func() {
					resp, err := client.Post(fmt.Sprintf("http://%s/%d", link.Host(), size), "", bytes.NewReader(sent))
					if err != nil {
						t.Error(err)
						return
					}
					defer resp.Body.Close()
					got, err := io.ReadAll(resp.Body)
					if err != nil || !bytes.Equal(got, content(size)) {
						t.Errorf("got %d bytes, %v; want the %d that the server sent", len(got), err, size)
					}
					if want := fmt.Sprintf("%x", sha256.Sum256(sent)); resp.Header.Get("Sum") != want {
						t.Errorf("the server got a body of digest %s, want %s", resp.Header.Get("Sum"), want)
					}
				})
			}
			all.Wait()
			got := link.Stats()
			if got.Requests != 4 || got.Connections != 4 || got.Down < 4*size || got.Up < 4*int64(len(sent)) {
				t.Errorf("Stats() = %+v, want 4 requests over 4 connections with at least %d bytes down and %d up", got, 4*size, 4*len(sent))
			}
		})
	}
}

// A link is never faster than its profile, with one connection or several: that holds on a machine of any load.
func TestNeverFaster(t *testing.T) {
	p := linksim.Profile{RTT: 40 * time.Millisecond, BitsPerSecond: 80e6}
	link, client := start(t, p, http.HandlerFunc(payload))
	const size = 500_000 // 50 ms
	began := time.Now()
	if _, err := get(client, fmt.Sprintf("http://%s/%d", link.Host(), size)); err != nil {
		t.Fatal(err)
	}
	if took, least := time.Since(began), 2*p.RTT+p.Transfer(size); took < least {
		t.Errorf("a request on a connection of its own took %s, want at least %s: two round trips and the transfer", took, least)
	}
	began = time.Now()
	if _, err := get(client, fmt.Sprintf("http://%s/%d", link.Host(), 0)); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < p.RTT {
		t.Errorf("a request on an open connection took %s, want at least %s", took, p.RTT)
	}
	if got := link.Stats().Connections; got != 1 {
		t.Errorf("%d connections, want the one that was kept", got)
	}
	began = time.Now()
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if _, err := get(client, fmt.Sprintf("http://%s/%d", link.Host(), size)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if took, least := time.Since(began), p.Transfer(4*size); took < least {
		t.Errorf("4 transfers at once took %s, want at least %s: they share the link", took, least)
	}
}

func TestRequests(t *testing.T) {
	link, client := start(t, linksim.Profile{}, http.HandlerFunc(payload))
	for _, r := range []string{"", "bytes=0-3", "bytes=5-"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+link.Host()+"/9?a=b", nil)
		if err != nil {
			t.Fatal(err)
		}
		if r != "" {
			req.Header.Set("Range", r)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	got := link.Requests()
	if len(got) != 3 || got[0].Method != "GET" || got[0].Target != "/9?a=b" || got[0].Range != "" || got[1].Range != "bytes=0-3" || got[2].Range != "bytes=5-" {
		t.Errorf("Requests() = %+v, want the three that were made", got)
	}
	link.Reset()
	if got := link.Stats(); got != (linksim.Stats{}) || len(link.Requests()) != 0 {
		t.Errorf("after Reset: %+v, %d requests; want none", got, len(link.Requests()))
	}
}

func TestCut(t *testing.T) {
	release := make(chan struct{})
	link, client := start(t, linksim.Profile{RTT: time.Millisecond, BitsPerSecond: 1e9}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("begin"))
		_ = http.NewResponseController(w).Flush()
		<-release
	}))
	url := "http://" + link.Host() + "/"
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	link.Cut()
	if _, err := io.ReadAll(resp.Body); err == nil {
		t.Error("a body over a link that was cut ends without an error")
	}
	if resp, err := client.Get(url); err == nil {
		resp.Body.Close()
		t.Error("a request over a link that is cut was answered")
	}
	close(release)
	link.Mend()
	if got, err := get(client, url); err != nil || string(got) != "begin" {
		t.Errorf("over the mended link: got %q, %v; want the answer", got, err)
	}
}

func TestServerDown(t *testing.T) {
	link, err := linksim.Start("127.0.0.1:1", linksim.Profile{})
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+link.Host()+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	if resp, err := client.Do(req); err == nil || ctx.Err() != nil {
		if err == nil {
			resp.Body.Close()
		}
		t.Errorf("with no server behind the link: got %v, want an error at once", err)
	}
}

func TestBadProfile(t *testing.T) {
	for _, p := range []linksim.Profile{{RTT: -1}, {BitsPerSecond: -1}} {
		if l, err := linksim.Start("127.0.0.1:1", p); err == nil {
			l.Close()
			t.Errorf("Start(%+v) succeeded, want an error", p)
		}
	}
}
