package nriplugin_test

import (
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/internal/nriplugin"
)

// A container that is to be recorded is expected when it is created; others are not.
func TestExpect(t *testing.T) {
	c := nriplugin.DefaultConfig()
	c.Namespaces = []string{"default"}
	expected := 0
	p, err := nriplugin.New(nriplugin.Options{Own: &c, Open: func(nriplugin.Config) (*nriplugin.Backend, error) {
		return &nriplugin.Backend{Expect: func() { expected++ }, Log: zap.NewNop()}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, pod := range []*api.PodSandbox{
		{Namespace: "default"},
		{Namespace: "other"},
		{Namespace: "default", Annotations: map[string]string{nriplugin.AnnotationTrace: "false"}},
		{Namespace: "other", Annotations: map[string]string{nriplugin.AnnotationTrace: "true"}},
		nil,
	} {
		adjust, updates, err := p.CreateContainer(t.Context(), pod, &api.Container{Id: "c", Name: "c"})
		if adjust != nil || updates != nil || err != nil {
			t.Errorf("CreateContainer(%v) = %v, %v, %v", pod, adjust, updates, err)
		}
	}
	if expected != 2 {
		t.Errorf("%d containers are expected, want 2", expected)
	}
	if err := p.Close(t.Context(), nriplugin.CloseOptions{Drain: time.Minute, Flush: time.Minute}); err != nil {
		t.Error(err)
	}
}
